"""Runs vbench's own entry points in the scorer environment: folders of files, matched by name.

Reads {"runs": {name: {"folder", "info", "mode"}}, "out"} and prints each run's result.
"""

import json
import os
import sys

request = json.load(sys.stdin)
sys.path.insert(0, request["worker"])
import worker  # noqa: E402

reply = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ["VBENCH_CACHE_DIR"] = request["out"]
worker.load("temporal_flickering")
import torch  # noqa: E402
from vbench import VBench  # noqa: E402

results = {}
for name, run in request["runs"].items():
    bench = VBench(torch.device("cpu"), run["info"], request["out"])
    mode = {"mode": run["mode"]} if run["mode"] else {}
    bench.evaluate(run["folder"], name, dimension_list=["temporal_flickering"], **mode)
    with open(os.path.join(request["out"], f"{name}_eval_results.json")) as file:
        value, rows = json.load(file)["temporal_flickering"]
    found = {os.path.basename(row["video_path"]): row["video_results"] for row in rows}
    results[name] = {"value": value, "rows": found}
with reply:
    json.dump(results, reply)
