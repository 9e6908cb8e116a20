"""A recommender inside other frameworks, each in its own convention: one module a framework.

    langchain      retriever, document compressor, tools
    llamaindex     retriever, node postprocessor
    haystack       retriever and ranker as components of a pipeline
    openai_tools   tool schemas and a dispatcher, for any chat API that takes them

All take a `Recommender`. A `Client` would not do: what a framework shows to a model is an item's whole line,
which the answers of a server leave out. Frameworks reach a server by what it speaks: MCP, and the rerank and
embedding endpoints of other services.

Importing a module of a framework that is not installed raises `ImportError`, which names the extra.
"""
