"""What a conversion reports: the table of its plan, and conversion.json beside the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from xomni_jax.checkpoint.conversion import ignored_rule
from xomni_jax.checkpoint.conversion_plan import ConversionPlan
from xomni_jax.core.tables import bytes_text


def plan_lines(plan: ConversionPlan) -> Iterator[str]:
    """The plan as a table: every source key, its transformation, and the parameter it becomes."""
    for name, rows in what_becomes(plan).items():
        params = plan.params[name]
        count, size = sum(math.prod(p.shape) for p in params), sum(p.nbytes for p in params)
        yield f"{name}: {count:,} parameters in {len(params)} arrays, {bytes_text(size)}"
        for row in rows["taken"]:
            dtype = row["dtype"] if row["dtype"] == row["stored_dtype"] else f"{row['dtype']} -> {row['stored_dtype']}"
            index = ("" if row["layer"] is None else f"[{row['layer']}]") + ("" if row["part"] is None else f" part {row['part']}")
            yield f"  {row['key']}  {dtype} {row['shape']}  {row['transform']}  {row['target']}{index}"
        for row in rows["new"]:
            yield f"  (new)  {row['stored_dtype']} {row['shape']}  {row['how']}  {row['target']}"
        for row in rows["dropped"]:
            yield f"  {row['key']}  dropped: {row['reason']}"


def what_becomes(plan: ConversionPlan) -> dict[str, Any]:
    """{component: rows of source tensors that are taken or dropped, and of parameters that are new}."""
    components: dict[str, Any] = {}
    for name, params in plan.params.items():
        part = plan.release.components[name]
        infos, taken, new, dropped = part.sources.infos, [], [], []
        for param in params:
            for rule in param.rules:
                info = infos[rule.source]
                source = {"file": str(info.file), "key": info.key, "dtype": info.dtype.name, "shape": list(info.shape)}
                target = {"target": param.path, "layer": rule.layer, "part": rule.part and rule.part[1]}
                taken.append(source | target | {"transform": rule.transform.name, "stored_dtype": param.dtype.name})
            if param.init:
                how = {"how": param.init.initializer.description, "seed": param.seed, "stored_dtype": param.dtype.name}
                new.append({"target": param.path, "shape": list(param.shape), **how})
        for key, info in infos.items():
            if ignored := ignored_rule(key, part.table):
                dropped.append({"file": str(info.file), "key": info.key, "reason": ignored.reason})
        components[name] = {"taken": taken, "new": new, "dropped": dropped}
    return components
