"""What to install where an import fails: `lexi_adapter` itself needs little, its commands torch or an engine."""

# Import name -> extra of this project that brings it; what is in none comes with the project itself.
EXTRAS = {"torch": "transformers", "transformers": "transformers", "vllm": "serve", "lm_eval": "eval"}
OWN = ("matplotlib", "numpy", "rich")


def explain_import(error: ImportError) -> str | None:
    """One line that names the package and the remedy; None for another's, whose absence is a defect here."""
    name = (error.name or "").partition(".")[0]
    if name in EXTRAS:
        return f"cannot import {name} ({error}); pip install '.[{EXTRAS[name]}]'"
    return f"cannot import {name} ({error}); pip install {name}" if name in OWN else None
