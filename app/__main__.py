"""The page: python -m app [--runs DIR] [--host H] [--port P]"""

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

from models.files import Parser, one_line_errors, temporary_folder

HERE = Path(__file__).parent
RUNS = Path("runs")  # need not be there: the page shows the shipped checkpoints
AUTH = "FADING_SHORTCUTS_AUTH"  # in the environment
MAX_SESSIONS = 500  # that are remembered, each up to 1 MiB; of more the ones that were idle longest are forgotten


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = Parser(prog="python -m app", description="Sample checkpoints side by side in a web page.")
    flags.add_argument("--runs", type=Path, default=RUNS, help="folder of your runs (default: %(default)s)")
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them (default: %(default)s)")
    flags.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    flags.add_argument("--root-path", default="", help="path under which a proxy shows the page, such as /shortcuts (default: none)")
    hidden = f"or set {AUTH}, which others on this machine cannot read"
    flags.add_argument("--auth", metavar="NAME:PASSWORD", help=f"let nobody in without these; {hidden} (default: everybody may)")
    flags.add_argument("--no-training", action="store_true", help="for public pages: nothing can be trained, judged or deleted")
    flags.add_argument("--data", type=Path, help="folder that images to train on must lie in (default: all that you may read)")
    flags.add_argument("--num-processes", type=int, default=1, help="of each training, one for each GPU (default: %(default)s)")
    at_most = "trainings and evaluations at once, all on the same GPUs; the others wait"
    flags.add_argument("--at-most", type=int, default=1, help=f"{at_most} (default: %(default)s)")
    nice = "how far trainings and evaluations on CPUs stand back behind the page and others: 0, not at all, to 19"
    flags.add_argument("--nice", type=int, default=10, help=f"{nice} (default: %(default)s)")
    flags.add_argument("--stop-trainings", action="store_true", help="let trainings save and end when the page ends, as containers want it")
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
        auth = os.environ.get(AUTH) if parsed.auth is None else parsed.auth
        name, _, password = (auth or "").partition(":")
        if auth is not None and not (name and password):
            raise ValueError(f"--auth (or {AUTH} in the environment) must be NAME:PASSWORD, neither of them empty")
        if min(parsed.at_most, parsed.num_processes) < 1:
            raise ValueError(f"--at-most is {parsed.at_most} and --num-processes {parsed.num_processes}; both must be at least 1")
        if not 0 <= parsed.nice <= 19:
            raise ValueError(f"--nice is {parsed.nice}; it must be between 0 and 19")
        if parsed.data is not None and not parsed.data.is_dir():
            raise ValueError(f"--data {parsed.data} is not a folder; give the one that images may be read from")
        if "GRADIO_TEMP_DIR" not in os.environ:
            # a folder of its own: at its end a page deletes what it was sent, by content, which may be another page's, too
            os.environ["GRADIO_TEMP_DIR"] = str(temporary_folder())
        from starlette.middleware import Middleware

        from app.guard import Guard
        from app.jobs import Jobs
        from app.site import Site
        from app.ui import build, theme
        from app.votes import Votes

        jobs = None if parsed.no_training else Jobs(parsed.runs, parsed.at_most, parsed.data, parsed.num_processes, parsed.nice)
        site = Site(parsed.runs, jobs, Votes(parsed.runs))
        page = build(site)
        page.launch(
            server_name=parsed.host,
            server_port=parsed.port,
            root_path=parsed.root_path or None,
            auth=(name, password) if auth else None,
            theme=theme(),
            css_paths=HERE / "page.css",
            head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            footer_links=["api"],
            max_file_size="32mb",
            ssr_mode=False,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(Guard)]},
            state_session_capacity=MAX_SESSIONS,
        )
        print(f"Fading Shortcuts is ready on {page.local_url}", flush=True)
        site.prepare()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            page.block_thread()
        finally:
            if jobs is not None and parsed.stop_trainings:
                page.close()
                jobs.stop_all()


if __name__ == "__main__":
    main()
