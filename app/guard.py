"""What is sent to the page, whatever it is, is answered with a result or one sentence, and leaves at most one line in its log."""

import html
import os
import traceback
from typing import Any

import gradio as gr
from gradio.utils import get_function_description
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_SENTENCE = 500  # characters
UNUSABLE = "the page cannot use what was sent"


def toast(words: str) -> str:
    """A message that says no more than its words: Gradio's page takes errors, warnings and notes for HTML."""
    return html.escape(words, quote=False)


class GuardedBlocks(gr.Blocks):
    """Blocks whose endpoints refuse in one sentence what they cannot read, and tell what each of their arguments is."""

    def get_api_info(self, *what: Any, **more: Any) -> Any:
        """Gradio's, with the arguments' descriptions, which it takes out of docstrings for MCP alone: a line for each of them."""
        told = super().get_api_info(*what, **more)
        for function in self.fns.values():
            if endpoint := told["named_endpoints"].get(f"/{function.api_name}"):
                described = get_function_description(function.fn)[1]
                for argument in endpoint["parameters"]:
                    argument["python_type"]["description"] = described.get(argument["parameter_name"], "")
        return told

    async def process_api(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> dict[str, Any]:
        """Gradio's, with every exception as a `gr.Error`: others would come out as an error without a word, and a traceback."""
        function = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        name = str(function.api_name or function.name)
        try:
            wanted = len(function.inputs)
            if not function.batch and len(inputs) < wanted:
                raise gr.Error(f"{name} takes {wanted} value{'s' * (wanted > 1)}, not {len(inputs)}")
            return await super().process_api(block_fn, inputs, *rest, **options)
        except gr.Error as error:
            words = _one_line(error.message)
            if function.api_visibility == "private":  # told by the page, which takes a message for HTML; programs get plain text
                words = toast(words)
            raise gr.Error(words, duration=error.duration, title=error.title, print_exception=False) from error
        except Exception as error:
            _log(name, error)
            raise gr.Error(f"{UNUSABLE} to {name}", print_exception=False) from error


class Guard:
    """ASGI middleware: a request that breaks a route is answered with status 400 and one sentence."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        begun = False

        async def noticed(message: Message) -> None:
            nonlocal begun
            begun |= message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noticed)
        except Exception as error:
            if scope["type"] != "http":
                raise
            _log(str(scope["path"]), error)
            if begun:  # a stream, whose events told what there was to tell
                await send({"type": "http.response.body"})
            else:
                await JSONResponse({"detail": UNUSABLE}, status_code=400)(scope, receive, send)


def _log(where: str, error: Exception) -> None:
    """One line, in ASCII: what it is about comes from outside."""
    print(ascii(f"{where[:100]} failed: {type(error).__name__}: {_one_line(str(error))}")[1:-1], flush=True)
    if os.environ.get("FADING_SHORTCUTS_DEBUG"):
        traceback.print_exception(error)


def _one_line(text: str) -> str:
    """A sentence that every client can decode."""
    return " ".join(str(text).encode(errors="replace").decode().split())[:MAX_SENTENCE]
