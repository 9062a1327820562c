import sys

try:
    from smolvlm_exp.main import main
except ModuleNotFoundError as error:
    if (error.name or "smolvlm_exp").startswith("smolvlm_exp"):
        raise
    sys.exit(
        f"smolvlm_exp: {error.name} is not installed for {sys.executable}. Activate the environment that has it, "
        r"`. .venv/bin/activate` (on Windows .venv\Scripts\activate), or install it: pip install -e ."
    )

main()
