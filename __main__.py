"""``python -m unmemorize``."""


def main() -> None:
    """Run the command line; Ctrl-C ends it with 130, also while it is imported."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
