"""What the event stores have in common: the form of stored items, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmrec.errors import DataError
from llmrec.protocols import ItemChange
from llmrec.types import Event, Item

BUSY_SECONDS = 30.0
"""How long to wait for another process that is writing."""

Row = tuple[str, str, int | None, float, str | None]
"""user_id, item_id, timestamp, weight, event_id."""


def row_of(event: Event) -> Row:
    """Return an event as it is stored."""
    return event.user_id, event.item_id, event.timestamp, event.weight, event.event_id


def refused(count: int, error: Exception) -> DataError:
    """Return what to raise where the database refuses an event."""
    return DataError(
        f"none of {count} events was stored, since one was refused: {str(error).splitlines()[0]}; an event "
        f"needs a user_id, an item_id and a weight that is a number"
    )


def with_ids(events: Sequence[Event]) -> dict[tuple[str, str], Event]:
    """Return the events that have an id by (user, id).

    Raises
    ------
    DataError
        If two of them have the same user and id and are not the same event.
    """
    known: dict[tuple[str, str], Event] = {}
    for event in events:
        if event.event_id is not None:
            first = known.setdefault((event.user_id, event.event_id), event)
            check_same(event, first.item_id, first.weight)
    return known


def check_same(event: Event, item_id: str, weight: float) -> None:
    """Check that an event is the one that is stored under its id.

    Raises
    ------
    DataError
        If item or weight differ. The time may: a server takes its own where none is given.
    """
    if (event.item_id, float(event.weight)) != (item_id, weight):
        raise DataError(
            f"event_id {event.event_id!r} of user {event.user_id!r} is taken by an event with item "
            f"{item_id!r} and weight {weight:g}, got {event.item_id!r} and {event.weight:g}: send the same "
            f"event again, or give a new one an id of its own"
        )


def body_of(change: ItemChange) -> str | None:
    """Return a change without the id of its item as JSON; None for a removed one that is not known."""
    item = change.item
    if item is None:
        return None
    values: dict[str, Any] = {"title": item.title, "text": item.text, "attributes": dict(item.attributes)}
    more = {"code": change.code, "removed": change.removed or None}
    return json.dumps(values | {name: value for name, value in more.items() if value is not None})


def changes_of(rows: Iterable[tuple[str, str | None]]) -> Iterator[ItemChange]:
    """Read pairs of id and body."""
    for item_id, body in rows:
        if body is None:
            yield ItemChange(item_id, None, removed=True)
        else:
            values = json.loads(body)
            item = _item(item_id, values)
            yield ItemChange(item_id, item, values.get("code"), values.get("removed", False))


def _item(item_id: str, values: Mapping[str, object]) -> Item:
    attributes = values["attributes"]
    assert isinstance(attributes, dict)
    return Item(
        item_id,
        str(values["title"]),
        str(values["text"]),
        {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()},
    )


def is_text(user_id: str) -> bool:
    """Whether an id can be stored at all: half of a surrogate pair is no text."""
    try:
        user_id.encode()
    except UnicodeEncodeError:
        return False
    return True
