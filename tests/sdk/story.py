"""The public Python SDK against a daemon: what is called here works unchanged.

The daemon's address and key are in MIOSA_TEST_URL and MIOSA_TEST_KEY.
"""

import asyncio
import contextlib
import json
import os

import miosa
import websockets
from miosa.errors import AuthenticationError, MiosaError, NotFoundError, ValidationError
from miosa.pagination import iter_cursor_pages, iter_pages

URL, KEY = os.environ["MIOSA_TEST_URL"], os.environ["MIOSA_TEST_KEY"]
client = miosa.Miosa(api_key=KEY, base_url=URL, max_retries=0, timeout=120)


def refused(kind, call, code):
    try:
        call()
    except kind as error:
        assert code in (None, error.code), (error.code, code)
        assert error.request_id.startswith("req-"), error.request_id
        assert error.message
        return error
    raise AssertionError(f"{code} was not raised")


# Who may call.
stranger = miosa.Miosa(api_key="not-a-key-of-ours", base_url=URL, max_retries=0)
refused(AuthenticationError, lambda: stranger.sandboxes.list(), "invalid_api_key")

# Create, find, look at.
assert client.sandboxes.list() == []
box = client.sandboxes.create("base", name="sdk", timeout_sec=3600, env={"A": "b"}, metadata={"n": 1}, tags=["t"], wait=True)
assert box.state == "running" and box.ready and box.persistent, box.data
assert (box.name, box.slug, box.template_id, box.timeout_sec) == ("sdk", "sdk", "base", 3600), box.data
assert box.cpu_count and box.memory_mb and box.metadata["n"] == 1, box.data
assert box.created_at and box.started_at and box.ready_at and not box.destroyed_at
assert client.sandboxes.get(box.id).id == box.id
assert client.sandboxes.get_by_name("sdk").id == box.id
assert client.sandboxes.connect(box.id).id == box.id
assert [s.id for s in client.sandboxes.list(state="running")] == [box.id]
assert box.wait_until_ready(timeout=60)
assert box.readiness()["ready"] is True
refused(NotFoundError, lambda: client.sandboxes.get("sb-none"), "sandbox_not_found")
refused(MiosaError, lambda: client.sandboxes.create("base", name="sdk"), "name_taken")
refused(NotFoundError, lambda: client.sandboxes.create("no-such-template"), "template_not_found")
refused(ValidationError, lambda: client.sandboxes.list(state="asleep"), "invalid_input")

# The same create with the same key is the same sandbox.
KEY_ONE = os.urandom(8).hex()
one = client.sandboxes.create("base", auto_start=False, idempotency_key=KEY_ONE)
two = client.sandboxes.create("base", auto_start=False, idempotency_key=KEY_ONE)
assert one.id == two.id and one.state == "paused", (one, two)
refused(ValidationError, lambda: client.sandboxes.create("base", name="other", idempotency_key=KEY_ONE), "idempotency_key_reused")
got = client.sandboxes.get_or_create(name="sdk", template_id="base")
assert got.id == box.id

# Commands.
ran = box.exec.run("echo $A; echo no >&2; exit 3")
assert (ran.stdout, ran.stderr, ran.exit_code) == ("b\n", "no\n", 3), ran
assert ran.duration_ms >= 0
assert box.run("true", {"cwd": "/"}).exit_code == 0
assert box.run("echo $X", {"env": {"X": "y"}, "timeout": 30}).stdout == "y\n"
events = list(box.exec_stream("echo one; echo two; exit 4"))
assert "one" in str(events) and "two" in str(events) and "4" in str(events[-1]), events

# Files.
content = bytes(range(256)) * 1000
box.upload("/workspace/bytes", content)
assert box.download("/workspace/bytes") == content
box.write_file("/workspace/text", "äöü")
assert box.read_file("/workspace/text") == "äöü"
refused(NotFoundError, lambda: box.download("/workspace/absent"), None)

# Snapshots and forks.
snapshot = box.create_snapshot("before")
assert snapshot["id"] and snapshot["status"] == "ready" and snapshot["comment"] == "before", snapshot
assert [s["id"] for s in box.list_snapshots()] == [snapshot["id"]]
box.write_file("/workspace/text", "changed")
fork = box.fork(name="sdk-fork", metadata={"m": 2})
assert fork.id != box.id and fork.metadata["m"] == 2, fork.data
assert fork.run("echo fork").stdout == "fork\n"
old = box.fork(name="sdk-old", snapshot_id=snapshot["id"])
assert old.run("echo old").stdout == "old\n"
box.delete_snapshot(snapshot["id"])
assert box.list_snapshots() == []

# Time.
assert box.extend(7200).timeout_remaining_ms > 7_000_000
assert box.stop().state == "paused"
assert client.sandboxes.get(box.id).state == "paused"
assert box.resume().state == "running"
assert box.pause().state == "paused"
# A command on a paused one resumes it.
assert box.run("echo awake").stdout == "awake\n"

# A terminal, made and then opened.
async def shell():
    made = box.terminal.create(rows=31, cols=99, env={"GREETING": "hello"})
    socket = await client.ws.connect_terminal(box.id)
    shown = b""
    # As text and as bytes.
    await socket.send("stty size; echo $GREETING:$((6 * 7))\n")
    while b"hello:42" not in shown:
        shown += await socket.recv()
    assert b"31 99" in shown, shown
    await socket.send(json.dumps({"type": "resize", "rows": 5, "cols": 6}))
    await socket.send(b"until [ \"$(stty size)\" = '5 6' ]; do :; done; exit 3\n")
    while isinstance(message := await socket.recv(), bytes):
        shown += message
    assert json.loads(message)["exit_code"] == 3, (message, shown)
    refused(NotFoundError, lambda: box.terminal.delete(made["session_id"]), "terminal_not_found")
    # One that is ended while somebody is at it.
    made = box.terminal.create()
    socket = await client.ws.connect_terminal(box.id)
    assert b"" != await socket.recv()
    box.terminal.delete(made["session_id"])
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            await socket.recv()


asyncio.run(shell())

# Pages.
pages = list(iter_cursor_pages(lambda **p: client.sandboxes._transport.request("GET", "/sandboxes", params=p), page_size=1, items_key="data"))
assert len(pages) == len({p["id"] for p in pages}) == len(client.sandboxes.list()) == 4, pages
pages = list(iter_pages(lambda **p: client.sandboxes._transport.request("GET", "/sandboxes", params=p), page_size=3, items_key="data"))
assert len(pages) == 4

# Templates.
assert "base" in str(client.sandboxes.list_templates())
assert client.sandboxes.get_template("base")["data"]["name"] == "base"

# The end.
for sandbox in client.sandboxes.list():
    sandbox.destroy()
    assert sandbox.state == "destroyed", sandbox.state
assert client.sandboxes.list() == []
refused(MiosaError, lambda: client.sandboxes.get(box.id).resume(), "sandbox_destroyed")
print("the story is told")
