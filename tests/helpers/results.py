"""Made-up results in the format of `lexi-adapter eval` and `bench`, and what a made-up task of lm-eval says."""

K = {"mine.json": {"0": 1, "1": 3}, "uniform k = 2": {"0": 2, "1": 2}}
TASKS = (("perplexity a.txt", "perplexity"), ("perplexity a.txt", "loss"), ("passkey 100", "accuracy"))
MADE_TASK = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def make_quality(names=("base", "mine.json", "uniform k = 2", "pruned", "alone")):
    return {
        "format": "lexi-eval",
        "version": 1,
        "model": "here",
        "variants": [{"name": name} | ({"top_k": K[name]} if name in K else {}) for name in names],
        "summary": [
            {"variant": name, "task": task, "metric": metric, "value": place + 10 * number, "stderr": None}
            for place, name in enumerate(names)
            for number, (task, metric) in enumerate(TASKS)
        ],
    }


def make_speed(names=("base", "./mine.json", "uniform k = 2, 50 %", "pruned"), overrides=None):
    top_k = {"./mine.json": K["mine.json"], "uniform k = 2, 50 %": K["uniform k = 2"]}
    full = {"0": 4, "1": 4}
    return {
        "format": "lexi-bench",
        "version": 1,
        "variants": [
            {"name": name, "overrides": overrides or {}, "engine": {"top_k": top_k.get(name, full)}} for name in names
        ],
        "workloads": ["16x8x8", "1x8x8"],
        "summary": [
            {"variant": name, "workload": work, "median": 100.0 + n, "lowest": 90.0 + n, "highest": 120.0 + n}
            for n, name in enumerate(names)
            for work in ("16x8x8", "1x8x8")
        ],
    }
