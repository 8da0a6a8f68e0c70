# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for TRITON_INTERPRET=1: conversion to bfloat16 as hardware does it, and speed.

Triton's interpreter cuts bits off where every GPU rounds to the nearest, so that gradients would
be judged by the interpreter's error and not by the kernels'. And it replaces Triton's functions by
its own at every call of one kernel's function by another, where they have been replaced already.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _round_to_nearest(values, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        numbers = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return numbers.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
    return _convert(values, source, target, rounding)


_patch = interpreter._patch_lang


def _patch_once(fn):
    languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()  # nothing to undo
    return _patch(fn)


interpreter._convert_float = _round_to_nearest
if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang = _patch_once
# Masked classes make inf - inf, which GPUs do not report.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
