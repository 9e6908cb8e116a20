"""Tools in the format of OpenAI's chat and responses APIs, which many other services and servers share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llmrec.adapters.tools import VERBS, verb_of
from llmrec.errors import LLMRecError, RequestError, told
from llmrec.recommender import Recommender

Api = Literal["chat", "responses"]


class OpenAITools:
    """Schemas to offer to a chat model, and a dispatcher for the calls that it makes.

    Parameters
    ----------
    recommender
        Fitted or loaded.
    user
        Id of the user whom the model talks to. Where it is given, the model can ask for no other.
    names
        Which tools to offer, of recommend, search_items, similar_items and rank_items.

    Raises
    ------
    RequestError
        If there is no such tool.
    """

    def __init__(
        self, recommender: Recommender, user: str | None = None, names: Sequence[str] = tuple(VERBS)
    ) -> None:
        self.recommender = recommender
        self.user = user
        self.verbs = {name: verb_of(name) for name in names}

    def schemas(self, api: Api = "chat") -> list[dict[str, Any]]:
        """Return the tools as the API takes them in ``tools``, for strict mode.

        They name the attributes of the catalogue and their most frequent values as they are now.

        Parameters
        ----------
        api
            ``chat`` for chat completions, where a function stands under a key of its own; ``responses``.
        """
        tools = []
        for name, verb in self.verbs.items():
            arguments = verb.schema(self.recommender.catalog, bound=self.user is not None)
            function = {
                "name": name,
                "description": verb.description,
                "parameters": strict(arguments.model_json_schema()),
                "strict": True,
            }
            tools.append(
                {"type": "function", "function": function}
                if api == "chat"
                else {"type": "function", **function}
            )
        return tools

    def dispatch(self, name: str, arguments_json: str) -> str:
        """Carry out a call of the model and return what to tell it, as JSON.

        Never raises for what a model may get wrong: the answer to a bad call is ``{"error": message}``, and
        the message says what to change. The answer to a good one is that of `Answer.as_json`. Blocks while
        the recommender computes; in a coroutine use ``await asyncio.to_thread(tools.dispatch, ...)``.
        """
        try:
            if not isinstance(name, str) or name not in self.verbs:
                raise RequestError(f"there is no tool {name!r:.100}; there are {', '.join(self.verbs)}")
            answer = self.verbs[name].run(self.recommender, _parsed(arguments_json), self.user)
            return answer.as_json()
        except LLMRecError as error:
            # A message may quote what no encoder takes, such as half a surrogate pair.
            message = told(error).encode("utf-8", "replace").decode()
            return json.dumps({"error": message}, ensure_ascii=False)
        except RecursionError:
            return json.dumps({"error": "the arguments are nested too deeply"})


def _parsed(arguments_json: object) -> dict[str, Any]:
    """Read the arguments of a call; some models send nothing at all where there are none."""
    if not isinstance(arguments_json, str):
        raise RequestError(f"the arguments are JSON text, got {type(arguments_json).__name__}")
    try:
        values = json.loads(arguments_json.strip() or "{}", parse_constant=_refused)
    except (ValueError, RecursionError) as broken:
        raise RequestError(f"the arguments are not valid JSON: {broken}") from None
    if not isinstance(values, dict):
        raise RequestError(f"the arguments must be a JSON object, got {values!r:.100}")
    return values


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema as strict mode takes it.

    Every object names all its properties as required and allows no others, and references are replaced by
    what they refer to; titles and defaults, which mean nothing there, go.
    """
    definitions = schema.get("$defs", {})

    def rewritten(part: Any) -> Any:
        if isinstance(part, list):
            return [rewritten(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            target = definitions[part["$ref"].rpartition("/")[2]]
            return rewritten(target | {key: value for key, value in part.items() if key != "$ref"})
        kept = {
            key: {name: rewritten(one) for name, one in value.items()}
            if key == "properties"
            else rewritten(value)
            for key, value in part.items()
            if key not in ("title", "default", "$defs")
        }
        if kept.get("type") == "object":
            kept |= {"required": list(kept.get("properties", {})), "additionalProperties": False}
        return kept

    result: dict[str, Any] = rewritten(dict(schema))
    return result
