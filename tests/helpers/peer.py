"""Renders conversations with another package's renderers, in an environment of its own.

    python tests/helpers/peer.py renderers|tinker_cookbook < conversations.json > tokens.json

The input is an object with `tokenizer`, a folder, and `cases`, each with `renderer` and `messages`, and with
`tools` if there are any. The output is a list with the tokens and the mask of each case's last reply, or with
the error that was raised.
This file is run by the other environment and imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def of_renderers(tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from renderers import configs
    from renderers.base import create_renderer  # type: ignore[attr-defined]

    def render(case: dict[str, Any]) -> dict[str, Any]:
        kinds = [
            kind
            for kind in vars(configs).values()
            if isinstance(kind, type) and hasattr(kind, "model_fields")
        ]
        kind = next(
            k
            for k in kinds
            if k.model_fields.get("name") and k.model_fields["name"].default == case["renderer"]
        )
        renderer = create_renderer(tokenizer, kind(**case.get("options", {})))
        found = renderer.render(case["messages"], tools=case.get("tools"))
        last = len(case["messages"]) - 1
        mask = [
            bool(sampled and index == last)
            for sampled, index in zip(found.sampled_mask, found.message_indices, strict=True)
        ]
        return {"tokens": list(found.token_ids), "mask": mask}

    return render


def of_tinker_cookbook(tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from tinker_cookbook import renderers

    def content(message: dict[str, Any]) -> dict[str, Any]:
        if "reasoning_content" not in message:
            return message
        parts = [
            {"type": "thinking", "thinking": message["reasoning_content"]},
            {"type": "text", "text": message["content"]},
        ]
        return {"role": message["role"], "content": parts}

    def render(case: dict[str, Any]) -> dict[str, Any]:
        renderer = renderers.get_renderer(case["renderer"], tokenizer)
        messages = [content(message) for message in case["messages"]]
        mode = renderers.TrainOnWhat.LAST_ASSISTANT_MESSAGE
        model_input, weights = renderer.build_supervised_example(messages, train_on_what=mode)
        return {"tokens": model_input.to_ints(), "mask": [bool(weight) for weight in weights]}

    return render


def main() -> None:
    from transformers import AutoTokenizer

    request = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    render = {"renderers": of_renderers, "tinker_cookbook": of_tinker_cookbook}[sys.argv[1]](tokenizer)
    answers = []
    for case in request["cases"]:
        try:
            answers.append(render(case))
        except Exception as error:  # whatever the package raises is its answer
            answers.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
