"""The class of processor that a run and `sppo doctor` print."""

from __future__ import annotations

import pytest
import torch

from sppo.models.loading import native_bfloat16, processor

CPU = torch.device("cpu")
WIDEST = ["avx2", "avx512_f", "avx512_bf16", "amx_bf16"]


@pytest.mark.parametrize(
    ("flags", "kind", "bfloat16"),
    [(0, "", None), (1, " (AVX2)", None), (2, " (AVX-512)", None), (3, " (AVX512-BF16)", "AVX512-BF16"), (4, " (AMX)", "AMX")],
)  # fmt: skip
def test_the_fastest_class_that_a_processor_has_is_named(monkeypatch, flags, kind, bfloat16):
    has = {"cpu_name": "Made up", **dict.fromkeys(WIDEST, False), **dict.fromkeys(WIDEST[:flags], True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert processor(CPU) == f"Made up{kind}, threads: {torch.get_num_threads()}"
    assert native_bfloat16(CPU) == bfloat16
