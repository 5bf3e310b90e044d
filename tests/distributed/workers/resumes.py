"""The resumes that `behaviour` leaves out: every stage and offload kind, cut before, at and after a refresh; and with
other criteria, cut before a refresh.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import engines
from behaviour import SETTINGS, resume

if __name__ == "__main__":
    engines.start()
    folder = sys.argv[1]
    results: dict[str, Any] = {}
    for cut in (2, 3, 4):
        for stage in range(4):
            results[f"stage {stage} after {cut}"] = resume(stage, cut, folder)
        for stage in (1, 2, 3):
            results[f"bf16 stage {stage} after {cut}"] = resume(stage, cut, folder, bf16=True)
        for stage in (2, 3):
            results[f"offload stage {stage} after {cut}"] = resume(stage, cut, folder, offload=True)
    for criterion, stage in (("random", 2), ("smallest", 3), ("gradient", 2), ("gradient", 3)):
        settings = replace(SETTINGS, criterion=criterion, solver="gram")
        results[f"{criterion} stage {stage} after 2"] = resume(stage, 2, folder, settings=settings)
    engines.finish(folder, results)
