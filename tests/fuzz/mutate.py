"""Damages values, files and folders in the ways that disks, editors and strangers do. Everything derives from the generator that is passed in."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from safetensors import SafetensorError

DEEP = 3000
STRINGS = (
    "", " ", "\n", "\x00", "\udcff", "‮\u200b", "𝒳" * 50, "x" * 20_000, "../../../etc/passwd", "/", "/dev/null", ".", "~", "-1", "nan", "1e999",
    "true", "null", "{}", "[]", "{{ 7*7 }}", "%s%n", "${HOME}", "$(touch RAN)", "\\boxed{", "```python\n", "<script>", "a:b:c=,=", "os:system",
    "tiny:hidden=0", "tiny:hidden=-1", "tiny:heads=7", "chain:steps=0", "chain:steps=9-1", "mlp", "control:nothing", "hub:", "gym:", "gym:nothing",
    "code + ", "0 * answer", "answer gate", "model:", "math and math and", "((((", "9" * 400, "1" + "0" * 30,
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**40,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)


def odd(rng: random.Random, like: Any = None) -> Any:
    """A value that few expect in this place: of another type as a rule, sometimes of the same."""
    nested: Any = rng.choice(STRINGS)
    for _ in range(rng.choice((1, 2, 50))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    if isinstance(like, str) and like and rng.random() < 0.4:
        return garble(rng, like)
    if isinstance(like, (int, float)) and not isinstance(like, bool) and rng.random() < 0.4:
        return like * rng.choice((-1, 0, 1.5, 10, 1000))
    if isinstance(like, list) and like and rng.random() < 0.4:
        return rng.choice(([], like[:1], like * 2, [*like, None], [like], like[::-1]))
    return rng.choice(
        (
            None,
            True,
            False,
            rng.choice(STRINGS),
            rng.choice(STRINGS),
            rng.choice(NUMBERS),
            rng.choice(NUMBERS),
            [],
            {},
            nested,
        )
    )


def garble(rng: random.Random, text: str) -> str:
    """A text with a few characters gone, doubled, replaced or swapped."""
    at, n = rng.randrange(len(text)), rng.randint(1, 4)
    insert = rng.choice((*STRINGS[:7], *":=,+*()[]{}\"'\\<>%$#@-0"))
    return rng.choice(
        (
            text[:at] + text[at + n :],
            text[:at] + insert + text[at:],
            text[:at],
            text[at:],
            text + text,
            text[:at] + insert + text[at + n :],
        )
    )


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:20]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def damage_tree(rng: random.Random, tree: Any, most: int = 3) -> Any:
    """A copy with one to `most` values replaced, removed, renamed, doubled or moved elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, most)):
        paths = list(places(tree))
        if not paths:
            return odd(rng)
        path = rng.choice(paths)
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        what = rng.random()
        if what < 0.6:
            parent[key] = odd(rng, parent[key])
        elif what < 0.75:
            del parent[key]
        elif what < 0.85 and isinstance(parent, dict):
            parent[garble(rng, str(key)) if key else "x"] = parent.pop(key)
        elif what < 0.95:
            parent[key] = copy.deepcopy(tree) if what < 0.9 else [parent[key]]
        elif isinstance(parent, dict):
            parent[rng.choice(STRINGS[:12])] = odd(rng)
    return tree


def plain(value: Any) -> Any:
    """The value as TOML can write it (it has no null, and integers of 64 bits)."""
    if isinstance(value, dict):
        return {clean(str(k)): plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value if v is not None]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return float(value)
    return clean(value) if isinstance(value, str) else value


def clean(text: str) -> str:
    """Without surrogates, which no file in UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut short, flipped, doubled, overwritten, emptied, or in another encoding."""
    n = len(data)
    at = rng.randrange(n) if n else 0
    noise = rng.randbytes(rng.choice((1, 4, 64)))
    return rng.choice((
        b"", data[:at], data[at:], data[: n // 2], data + data, data[:at] + noise + data[at + len(noise) :], data[:at] + noise + data[at:],
        b"\xef\xbb\xbf" + data, b"\x00" * min(n, 4096), data.replace(b"\n", b"\r"), b"[" * DEEP + data, b'{"a":' * DEEP, b"\xff\xfe" + data,
        b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n", data.replace(b"1", b"9" * 30, 3),
    ))  # fmt: skip


def damage_table(rng: random.Random, path: Path) -> None:
    """A parquet file with a column gone, renamed, emptied, of another type, or with rows gone or doubled."""
    table = pq.read_table(path)
    names = table.column_names
    i = rng.randrange(len(names))
    what = rng.randrange(8)
    if what == 0:
        table = table.drop_columns([names[i]])
    elif what == 1:
        table = table.rename_columns([garble(rng, n) if j == i else n for j, n in enumerate(names)])
    elif what == 2:
        table = table.set_column(i, names[i], pa.nulls(table.num_rows, table.schema.field(i).type))
    elif what == 3:
        table = table.set_column(i, names[i], pa.array([str(rng.choice(STRINGS[:3])) for _ in range(table.num_rows)]))
    elif what == 4:
        table = table.set_column(i, names[i], pa.array([rng.choice((0, -1, 2**40, 7)) for _ in range(table.num_rows)]))
    elif what == 5:
        table = table.slice(0, rng.choice((0, 1, table.num_rows // 2)))
    elif what == 6:
        table = pa.concat_tables([table, table])
    else:
        table = table.select([])
    pq.write_table(table, path)


def damage_tensors(rng: random.Random, path: Path) -> None:
    """A safetensors file with a tensor gone, renamed, of another shape or type, or not finite."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    changes: tuple[Callable[[torch.Tensor], torch.Tensor | None], ...] = (
        lambda t: None, lambda t: t[:1].clone(), lambda t: t.reshape(-1), lambda t: t.to(torch.int32), lambda t: t * float("nan"),
        lambda t: t.to(torch.float64), lambda t: t * 1e30, lambda t: torch.zeros(0),
    )  # fmt: skip
    changed = rng.choice(changes)(tensors.pop(name))
    if changed is not None:
        tensors[name if rng.random() < 0.8 else garble(rng, name)] = changed.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def damage_file(rng: random.Random, path: Path) -> None:
    """One file of a folder: what stands in its place, its bytes, or its structure where it has one."""
    what = rng.random()
    if what < 0.06:
        path.unlink()
    elif what < 0.12:
        path.unlink()
        rng.choice(
            (
                path.mkdir,
                path.touch,
                lambda: path.symlink_to(path),
                lambda: path.symlink_to("/"),
                lambda: os.mkfifo(path),
            )
        )()
    elif what < 0.35:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    else:
        try:
            damage_structure(rng, path)
        except (ValueError, pa.ArrowException, OSError, SafetensorError):  # damaged before
            path.write_bytes(damage_bytes(rng, path.read_bytes()))


def damage_structure(rng: random.Random, path: Path) -> None:
    """A file whose syntax stays sound. Raises ValueError, ArrowException or OSError where it is not sound now, or has no structure."""
    if path.suffix == ".json":
        path.write_text(json.dumps(damage_tree(rng, json.loads(path.read_text()))))
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        if rng.random() < 0.7:
            lines[i] = json.dumps(damage_tree(rng, json.loads(lines[i])))
        else:
            lines = rng.choice(
                (
                    lines[:i],
                    lines[i:],
                    lines + lines,
                    [*lines[:i], "null", *lines[i:]],
                    lines[::-1],
                    [*lines, lines[i][:20]],
                )
            )
        path.write_text("".join(line + "\n" for line in lines))
    elif path.suffix == ".toml":
        path.write_text(tomli_w.dumps(plain(damage_tree(rng, tomllib.loads(path.read_text())))))
    elif path.suffix == ".parquet":
        damage_table(rng, path)
    elif path.suffix == ".safetensors":
        damage_tensors(rng, path)
    else:
        raise ValueError(path.suffix)


def damage_folder(rng: random.Random, folder: Path) -> None:
    """One or two files of a folder damaged, or a part of it gone or moved."""
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        folders = sorted(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())
        if folders and rng.random() < 0.12:
            chosen = rng.choice(folders)
            shutil.rmtree(chosen)
            if rng.random() < 0.4:
                chosen.write_text("a file")
        elif len(files) > 1 and rng.random() < 0.06:
            shutil.copyfile(*rng.sample(files, 2))
        elif files:
            damage_file(rng, rng.choice(files))
