"""The text that no lab model was trained on."""

import json

from llmopt_lab.nn.weights import EMBEDDED


def held_out_documents() -> dict[str, str]:
    """Name -> text of the held-out Python files that ship with the package."""
    content = json.loads((EMBEDDED / "heldout.json").read_text(encoding="utf-8"))
    return {document["name"]: document["text"] for document in content["documents"]}
