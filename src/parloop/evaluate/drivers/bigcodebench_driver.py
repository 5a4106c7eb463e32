"""bigcodebench_driver.py OUT.jsonl SUBSET [N]: write the first N problems (of BIGCODEBENCH_OVERRIDE_PATH, or downloaded)."""

import json
import os
import sys

out, subset, *limit = sys.argv[1:]
given = os.environ.get("BIGCODEBENCH_OVERRIDE_PATH")
if given:
    with open(given, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
else:
    from bigcodebench.data import get_bigcodebench

    rows = list(get_bigcodebench(subset=subset).values())
with open(out + ".partial", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows[: int(limit[0]) if limit else None])
os.replace(out + ".partial", out)
