"""Where live events are kept: durable once appended, erasable by user."""
