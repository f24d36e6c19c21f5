"""vLLM's configuration of tampered servings, in one process: the allocation that it holds, if the plugin lets it.

JSON jobs {"model", "options"} on standard input; a file of results, each {"top_k": that of the allocation, or null} or
{"error", "message"}.
"""

import json
import sys
from pathlib import Path

DEFAULTS = dict(enforce_eager=True, max_model_len=64, dtype="float32", skip_tokenizer_init=True)


def configure(job):
    from vllm.engine.arg_utils import EngineArgs

    from lexi_adapter.serving.vllm_plugin import Document

    try:
        config = EngineArgs(model=job["model"], **DEFAULTS | job["options"]).create_engine_config()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    found = [value for value in config.additional_config.values() if isinstance(value, Document)]
    return {"top_k": found[0]["top_k"] if found else None}


if __name__ == "__main__":
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    Path(sys.argv[1]).write_text(json.dumps([configure(job) for job in json.load(sys.stdin)]))
