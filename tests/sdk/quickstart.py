"""The quick-start of the SDK's description, on a stand-in machine: the same calls in the same order.

Two words differ from what is printed: programs of a stand-in are this machine's own, so that Python is asked for by the name
it has everywhere, and for the file by where it is in the working directory.
"""

import os

import miosa as sdk

miosa = sdk.Miosa(api_key=os.environ["MIOSA_TEST_KEY"], base_url=os.environ["MIOSA_TEST_URL"], max_retries=0)

for turn in ["made", "resumed"]:
    sb = miosa.sandboxes.create_agent_workspace("my-build", external_workspace_id="customer-workspace-123")
    assert sb.state == "running" and sb.persistent, sb.data

    result = sb.exec.run("python3 --version")
    assert result.stdout.startswith("Python 3"), result

    sb.files.write("/workspace/hello.py", "print('hello from miosa')")
    out = sb.exec.run("python3 hello.py", {"cwd": "/workspace"})
    assert out.stdout == "hello from miosa\n", out

    url = sb.preview.create(port=8000)["url"]
    assert url.startswith(f"http://8000-{sb.slug}.localhost:"), url

    sb.snapshots.create("after-hello-world")
    assert sb.pause().state == "paused"

assert len(miosa.sandboxes.list()) == 1
# A workspace of this kind keeps its last snapshot alone.
assert [s["comment"] for s in sb.snapshots.list()] == ["after-hello-world"]
print("started quickly")
