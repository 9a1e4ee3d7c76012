"""The page: python -m app [--runs DIR] [--host H] [--port P]"""

import argparse
import os
import socket
from pathlib import Path

from models.files import Parser, one_line_errors

HERE = Path(__file__).parent
RUNS = Path("runs")  # need not be there: the page shows the shipped checkpoints


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = Parser(prog="python -m app", description="Sample checkpoints side by side in a web page.")
    flags.add_argument("--runs", type=Path, default=RUNS, help="folder of your runs (default: %(default)s)")
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them (default: %(default)s)")
    flags.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return flags


def require_free(host: str, port: int) -> None:
    """Raise ValueError if nobody can listen there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be between 1 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host") from None


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parsed = parser().parse_args(arguments)
    with one_line_errors():
        require_free(parsed.host, parsed.port)
        if not parsed.runs.exists() and parsed.runs != RUNS:
            raise ValueError(f"--runs {parsed.runs} does not exist; give the folder that holds the runs")
        if parsed.runs.exists() and not parsed.runs.is_dir():
            raise ValueError(f"--runs {parsed.runs} is a file; give the folder that holds the runs")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: the page calls nobody
        from app.jobs import Jobs
        from app.site import Site
        from app.ui import build, theme
        from app.votes import Votes

        site = Site(parsed.runs, Jobs(parsed.runs), Votes(parsed.runs))
        page = build(site)
        page.launch(
            server_name=parsed.host,
            server_port=parsed.port,
            theme=theme(),
            css_paths=HERE / "page.css",
            head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            footer_links=["api"],
            max_file_size="32mb",
            ssr_mode=False,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"Fading Shortcuts is ready on {page.local_url}", flush=True)
        site.prepare_welcome()
        page.block_thread()


if __name__ == "__main__":
    main()
