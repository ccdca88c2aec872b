"""`sppo export`: a trained policy as a folder for elsewhere, with a model card; merged into its base, or uploaded, if
wanted."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ._shared import emit


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "export", help="a trained policy as a folder for elsewhere, with a model card", description=__doc__
    )
    parser.add_argument("path", metavar="RUN", help="a run (its newest checkpoint), a checkpoint or a policy folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--merged", action="store_true", help="an adapter as one model: its base with the products added to the weights"
    )
    parser.add_argument("--hub", metavar="NAME", help="also upload it to the hub, as NAME or OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="of --hub: a new repository is private")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder, and upload it."""
    source, to = _policy(args.path), Path(args.to).expanduser()
    if args.private and not args.hub:
        raise UserError("--private is of --hub NAME")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to: {to} is not empty; choose a new folder")
    from .hub import create, upload

    evidence = _run_of(source)
    hub = create(args.hub, args.private) if args.hub else ""  # refused now, and not after the work
    with _whole(to) as part:
        adapted = _write(source, part, to, evidence, args.merged, hub)
    if hub:
        upload(hub, to)
    result = {
        "folder": str(to),
        "adapter": adapted is not None,
        "base": adapted and adapted["name"],
        "hub": hub or None,
    }
    emit(
        result,
        args.json,
        "\n".join([f"{to} is written", *([f"it is at {hub}"] if hub else []), *_loading(to, adapted)]),
    )
    return 0


def _policy(given: str) -> Path:
    """The policy's folder of a run, a checkpoint or a folder. Raises UserError where there is none."""
    from ..models.mlp import is_control
    from ..run.directory import newest_policy

    path = Path(given).expanduser()
    if not path.is_dir():
        raise UserError(f"there is no folder {given}; name a run, a checkpoint or a policy folder")
    source = newest_policy(path)
    if is_control(str(source)):
        raise UserError(f"{given} is the policy of a control task, which no other program could load")
    if not any((source / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{given} is no run, no checkpoint and no model folder")
    return source


def _run_of(source: Path) -> tuple[Path, int] | None:
    """The run that a policy lies in, and its steps so far. Raises DataError where it is not what the run has saved."""
    from ..audit.chain import AuditChain

    checkpoint = source.resolve().parent
    run, step = checkpoint.parent.parent, checkpoint.name.removeprefix("step-")
    if checkpoint.parent.name != "checkpoints" or not (run / "recipe.toml").exists() or not step.isdecimal():
        return None
    if why := AuditChain(run).vouches_for(checkpoint, source.name):
        raise DataError(f"{source} is not what the run saved: {why}; export another checkpoint")
    return run, int(step)


@contextlib.contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once it is whole."""
    from safetensors import SafetensorError

    part = to.with_name(f".{to.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        yield part
        os.replace(part, to)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to: {to} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    source: Path, part: Path, to: Path, evidence: tuple[Path, int] | None, merged: bool, hub: str
) -> dict[str, str] | None:
    """Fill the folder; returns what an adapter in it stands on, None for a whole model."""
    from ..models.adapters import is_adapter
    from ..models.export import copy_adapter, write_merged

    adapted, base = is_adapter(str(source)), ""
    if merged and not adapted:
        raise UserError(f"--merged: {source} is a whole model already; leave --merged out")
    found = None
    if adapted and not merged:
        found = copy_adapter(source, part, to)
        base = found["name"]
    elif adapted:
        base = write_merged(source, part)["name"]
    else:
        shutil.copytree(source, part)
    text = _card(source, evidence, base, found, hub or to.resolve().name, bool(hub))
    if evidence is not None or not (part / "README.md").exists():
        (part / "README.md").write_text(text)
    return found


def _card(
    source: Path, evidence: tuple[Path, int] | None, base: str, found: Mapping[str, str] | None, name: str, hub: bool
) -> str:
    """The README.md: the run's model card; without a run, what little is known."""
    from ..report.reader import RunReader
    from ..report.single import card, header, is_hub_name

    reader = None if evidence is None else RunReader(*evidence)
    base = base or ("" if reader is None else reader.config.policy.model)
    known = {"base_model": base, "base_model_relation": "adapter" if found else "finetune"} if is_hub_name(base) else {}
    fields = {"library_name": "peft" if found else "transformers", **known, **_licence(base)}
    use = "\n".join(["## Use it", "", "```python", *_code(name, found, hub), "```"])
    if reader is None:
        return "\n".join([*header(fields), f"# {name}", "", "Its training run is not known here.", "", use, ""])
    recipe = f"## The recipe\n\n```toml\n{reader.config.without_places()}```\n"
    return f"{card(reader, fields, use)}\n{recipe}"


def _licence(base: str) -> dict[str, str]:
    """The licence of a base model, where its card says one: in its folder, or on the hub."""
    from huggingface_hub import hf_hub_download, metadata_load

    keys = ("license", "license_name", "license_link")
    with contextlib.suppress(Exception):  # no card, no network, no name of a hub: then it is not known
        path = Path(base) / "README.md" if Path(base).is_dir() else hf_hub_download(base, "README.md")
        return {k: str(v) for k, v in (metadata_load(path) or {}).items() if k in keys}
    return {}


def _code(name: str, adapter: Mapping[str, str] | None, hub: bool) -> list[str]:
    """Python that loads it."""
    imports, made = ["from transformers import AutoModelForCausalLM, AutoTokenizer"], [f'folder = "{name}"']
    model, options = "folder", 'dtype="auto"'
    if adapter is not None:
        imports = ["from peft import PeftModel", *imports]
        own = Path(adapter["name"]).is_absolute() and Path(adapter["name"]).name == "base"
        model, options = (
            'f"{folder}/base"' if own else f'"{adapter["name"]}"',
            f'dtype="{adapter.get("dtype", "auto")}"',
        )
        if adapter.get("quantize") and not own:  # one that lies beside it is quantised already
            imports.append("from transformers import BitsAndBytesConfig")
            options += f", quantization_config=BitsAndBytesConfig({_quantisation(adapter['quantize'])})"
        if own and hub:
            imports = ["from huggingface_hub import snapshot_download", *imports]
            made = [f'folder = snapshot_download("{name}")']
    loaded = f"AutoModelForCausalLM.from_pretrained({model}, {options})"
    made.append(f"model = {loaded}" if adapter is None else f"model = PeftModel.from_pretrained({loaded}, folder)")
    return [*imports, "", *made, "tokenizer = AutoTokenizer.from_pretrained(folder)"]


def _quantisation(kind: str) -> str:
    if kind == "int8":
        return "load_in_8bit=True"
    return 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'


def _loading(to: Path, adapter: Mapping[str, str] | None) -> list[str]:
    """How to load it, for the terminal."""
    from ..files import read_json

    path = shlex.quote(str(to.resolve()))
    lines, served = (
        ["in Python:", *(f"    {line}" for line in _code(str(to), adapter, False) if line)],
        f"vllm serve {path}",
    )
    if adapter is not None:
        base, rank = Path(adapter["name"]), read_json(to / "adapter_config.json").get("r", 16)
        options = f" --max-lora-rank {rank}" if isinstance(rank, int) and rank > 16 else ""
        options += " --quantization bitsandbytes" if adapter.get("quantize") else ""
        served = f"vllm serve {shlex.quote(str(base))} --enable-lora{options} --lora-modules {to.name}={path}"
        if base.is_absolute() and base.parent != to.resolve():
            needs = f"it needs its base, {base}; where that lies elsewhere, name it in {to}/adapter_config.json"
            lines = [needs, *lines]
    return [*lines, f"in vLLM:\n    {served}"]
