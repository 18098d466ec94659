"""What becomes of the public Python SDK's calls, as the table of docs/api.md.

Every call is made with the synchronous client and with the asynchronous one. Both have to end in the same way, and the
table is what happened. The daemon's address and key are in MIOSA_TEST_URL and MIOSA_TEST_KEY.
"""

import asyncio
import inspect
import io
import os
import socket
import tarfile

import miosa
from miosa.errors import MiosaError

# By section: calls in the order in which they are made, and what has to be true of the answer `it`.
CALLS = {
    "Sandboxes": [
        ("box = client.sandboxes.create('base', name=name, env={'A': 'b'})", "it.name == name"),
        ("box.wait_until_ready()", "it is True and box.state == 'running'"),
        ("client.sandboxes.list()", "box.id in [s.id for s in it]"),
        ("client.sandboxes.get(box.id)", "it.id == box.id"),
        ("client.sandboxes.get_by_name(name)", "it.id == box.id"),
        ("client.sandboxes.connect(box.id)", "it.id == box.id"),
        ("client.sandboxes.get_or_create(name=name)", "it.id == box.id"),
        ("box.refresh()", "it.id == box.id"),
        ("box.readiness()", "it['ready'] is True"),
        ("box.update(name=name + '-2', tags=['x'], metadata={'k': 1}, timeout_sec=900, persistent=True)",
         "(it.name, it.metadata['k'], it.timeout_sec) == (name + '-2', 1, 900) and it.timeout_remaining_ms <= 900_000"),
        ("box.update(idle_timeout_sec=600)", "it.idle_timeout_sec == 600 and it.metadata['k'] == 1"),
        ("client.sandboxes.get_by_name(name)", None),
        ("box.update(always_on=True)", "it.always_on and it.timeout_remaining_ms is None"),
        ("box.update(slug='other')", None),
        ("box.extend(7200)", "it.timeout_remaining_ms > 7_000_000"),
        ("box.tags.set(['a', 'b'])", "it['tags'] == ['a', 'b']"),
        ("box.env.set([{'key': 'C', 'value': 'd'}])", "{'key': 'A', 'value': 'b'} in it['vars']"),
        ("box.env.list()", "len(it['vars']) == 2"),
        ("box.env.delete('A')", None),
        ("box.run('echo $A$C')", "it.stdout == 'd\\n'"),
        ("box.resources()", "it['resources']['cpu'] == box.cpu_count"),
        ("box.resize(cpu_count=3, memory_mb=512)", "it['requires_restart'] and it['resources']['cpu'] == 3"),
        ("box.usage()", "it['sandbox_id'] == box.id and it['provisioned_vcpu_ms'] > 0"),
        ("box.events.stream()", "it['type'] == 'state' and 'running' in it['data']"),
        ("box.stop()", "it.state == 'paused'"),
        ("box.resume()", "(it.state, it.cpu_count) == ('running', 3)"),
        ("box.pause()", "it.state == 'paused'"),
        ("box.resume(env={'E': 'f'})", "it.state == 'running'"),
        ("box.run('echo $E')", "it.stdout == 'f\\n'"),
        ("box.resume(environment='prod')", None),
        ("box.wait_for_checkpoint()", "it is True"),
    ],
    "Commands": [
        ("box.exec('exit 3')", "it.exit_code == 3"),
        ("box.exec.run('echo $X', {'cwd': '/', 'env': {'X': 'y'}, 'timeout': 30})", "it.stdout == 'y\\n'"),
        ("box.exec.stream('echo one')", "it.type == 'stdout' and it.data['line'] == 'one'"),
        ("box.commands.run('true')", "it.exit_code == 0"),
        ("process = box.commands.run('echo one; echo two >&2; sleep 600', background=True)", "it.pid > 1"),
        ("process.status()", "(it['state'], it['pid']) == ('running', process.pid)"),
        ("process.kill()", None),
        ("process.status()", "(it['state'], it['exit_code']) == ('exited', 143)"),
        ("client.commands.run(box.id, 'true')", None),
        ("box.run_code('1')", None),
        ("server = box.processes.start('echo up; exec sleep 600', env={'A': 'b'}, name='server')", "it['name'] == 'server' and it['state'] == 'running'"),
        ("box.processes.list()", "server['pid'] in [p['pid'] for p in it]"),
        ("box.processes.get(server['pid'])", "it['id'] == server['id']"),
        ("box.processes.stream(server['pid'])", "it == {'line': 'up'}"),
        ("box.processes.logs(server['pid'], tail=1)", "it == 'up\\n'"),
        ("box.processes.stop(server['pid'])", None),
        ("box.processes.get(0)", None),
        ("client.commands.run(box.id, 'cat', stdin='in', timeout_seconds=3600)", "it['stdout'] == 'in'"),
        ("command = client.commands.run(box.id, 'sleep 600', detached=True)", "it['status'] == 'running'"),
        ("client.commands.list(box.id)", "command['id'] in [c['id'] for c in it]"),
        ("client.commands.get(box.id, command['pid'])", "it['id'] == command['id']"),
        ("client.commands.kill(box.id, command['pid'])", "it['exit_code'] == 143"),
        ("client.commands.logs(box.id, command['pid'])", "it['stdout'] == ''"),
        ("terminal = box.terminal.create(rows=30, cols=100, shell='sh', cwd='/workspace', env={'A': 'b'})", "it['session_id'] and it['rows'] == 30"),
        ("socket = client.ws.connect_terminal(box.id)", "it.state.name == 'OPEN'"),
        ("box.terminal.delete(terminal['session_id'])", None),
        ("box.terminal.delete('term-none')", None),
    ],
    "Files": [
        ("box.write_file('/workspace/f', 'text')", None),
        ("box.read_file('/workspace/f')", "it == 'text'"),
        ("box.upload('/workspace/b', bytes(256))", None),
        ("box.download('/workspace/b')", "it == bytes(256)"),
        ("box.download('/workspace/none')", None),
        ("box.files.write_files([{'path': '/workspace/d/g', 'data': 'x'}])", None),
        ("box.files.write_many([{'path': '/workspace/h', 'content': b'y'}, {'path': 'relative', 'content': b''}])",
         "[w['path'] for w in it['written']] == ['/workspace/h'] and it['failed'][0]['code'] == 'invalid_input'"),
        ("box.list_files('/workspace')", "{'b', 'd', 'f', 'h'} == {e['name'] for e in it['entries']}"),
        ("box.files.list('/workspace', depth=2)", "'/workspace/d/g' in [e['path'] for e in it['entries']]"),
        ("box.list_files('/none')", None),
        ("box.stat_file('/workspace/b')", "(it['size'], it['is_dir']) == (256, False)"),
        ("box.files.tree('/workspace')", "it['is_dir'] and any(c['path'] == '/workspace/d' and c['children'][0]['name'] == 'g' for c in it['children'])"),
        ("client.sandboxes._transport.request('GET', f'/sandboxes/{box.id}/files/workspace/b', raw_response=True)", "it.content == bytes(256)"),
        ("box.get_logs(lines=10)", None),
        ("box.stream_logs()", None),
        ("box.create_export('/workspace/b')", "(it['size_bytes'], it['filename']) == (256, 'b')"),
        ("box.create_export(['/workspace/b', '/workspace/none'])", None),
        ("box.download_export('/workspace/b')", "it == bytes(256)"),
        ("box.download_export(['/workspace/b', '/workspace/d'], filename='all.tar.gz')",
         "{'workspace/b': 256, 'workspace/d/g': 1}.items() <= members(it).items()"),
    ],
    "Snapshots": [
        ("snap = box.create_snapshot('first')", "it['status'] == 'ready'"),
        ("box.snapshot()", "it.startswith('snap-')"),
        ("box.list_snapshots()", "len(it) == 2"),
        ("box.snapshots.list()", "len(it) == 2"),
        ("box.restore_snapshot(snap['id'])", "it.id == box.id and it.state == 'running'"),
        ("fork = box.fork(name=name + '-fork')", "it.id != box.id"),
        ("box.fork(snapshot_id=snap['id'])", "it.id != box.id"),
        ("client.snapshot_history.list(resource_id=box.id)", "len(it['data']) == 2"),
        ("client.snapshot_history.groups(q=box.id)", "it['data'][0]['count'] == 2"),
        ("client.snapshot_history.get(snap['id'])", "it['data']['id'] == snap['id']"),
        ("client.snapshot_history.fork(snap['id'])", "it['data']['snapshot_id'] == snap['id']"),
        ("client.snapshot_history.bulk_delete(ids=[snap['id'], 'snap-none'])",
         "it['data']['deleted'] == [snap['id']] and it['data']['failed'][0]['code'] == 'snapshot_not_found'"),
        ("client.snapshot_history.bulk_delete(resource_id=box.id, all=True)", None),
        ("client.snapshot_history.bulk_delete(resource_id=box.id, all=True, confirm=box.id)", "len(it['data']['deleted']) == 1"),
        ("client.snapshot_history.delete(snap['id'])", None),
        ("box.delete_snapshot(snap['id'])", None),
    ],
    "Named snapshots": [
        ("golden = client.named_snapshots.create(name + '-golden', sandbox_id=box.id)", "it['data']['name'] == name + '-golden'"),
        ("client.named_snapshots.create(name + '-golden', sandbox_id=box.id)", None),
        ("client.named_snapshots.create('both', sandbox_id=box.id, snapshot_id='snap-1')", None),
        ("client.named_snapshots.list()", "golden['data']['name'] in [n['name'] for n in it['data']] and it['allowance']['used'] >= 1"),
        ("client.snapshot_history.list(resource_id=box.id)", "it['data'] == []"),
        ("client.snapshot_history.delete(golden['data']['snapshot_id'])", None),
        ("copy = client.named_snapshots.deploy(name + '-golden')", "it['data']['snapshot_id'] == golden['data']['snapshot_id']"),
        ("client.named_snapshots.get(name + '-golden')", "it['dependents'][0]['id'] == copy['data']['id']"),
        ("client.sandboxes.delete(copy['data']['id'])", None),
        ("client.named_snapshots.delete(name + '-golden')", "it['outcome'] == 'deleted'"),
        ("client.named_snapshots.get(name + '-golden')", None),
    ],
    "Batches": [
        ("batch = client.sandbox_batches.create(count=3, concurrency=2, template_id='base', name=name + '-many')",
         "it['requested_count'] == 3 and it['id'].startswith('batch-')"),
        ("client.sandbox_batches.events(batch['id'])", "it['type'] in ('batch_progress', 'batch_settled')"),
        ("client.sandbox_batches.get(batch['id'])", "it['requested_count'] == 3"),
        ("client.sandbox_batches.items(batch['id'])", "[i['name'] for i in it['data']] == [f'{name}-many-{n}' for n in (1, 2, 3)]"),
        ("client.sandbox_batches.items(batch['id'], limit=2)", "len(it['data']) == 2 and it['page']['has_more']"),
        ("client.sandbox_batches.cancel(batch['id'])", "it['id'] == batch['id']"),
        ("client.sandbox_batches.create(count=0)", None),
        ("client.sandbox_batches.create(count=2, setup_file='x')", None),
        ("client.sandbox_batches.get('batch-none')", None),
        ("client.sandbox_batches.run(command='echo $((6 * 7))', persistent=False)",
         "it['result']['stdout'] == '42\\n' and it['state'] == 'destroyed'"),
        ("kept = client.sandbox_batches.run(command=['false'], template_id='base')",
         "it['result']['exit_code'] == 1 and it['state'] == 'running'"),
        ("client.sandboxes.delete(kept['id'])", None),
        ("client.sandbox_batches.run(command='true', template_id='none')", None),
        ("client.operations.get(batch['id'])", "it['type'] == 'sandbox_batch'"),
        ("client.operations.events(batch['id'])", "it['resource_id'] == batch['id']"),
        ("client.operations.get('op-none')", None),
    ],
    "Volumes": [
        ("vol = client.volumes.create(name=name + '-data', size_gb=1)", "it['status'] == 'available' and it['size_gb'] == 1"),
        ("client.volumes.list()", "vol['id'] in [v['id'] for v in it]"),
        ("client.volumes.get(vol['id'])", "it['name'] == name + '-data' and it['attachments'] == []"),
        ("client.volumes.create(name=name + '-data', size_gb=1)", None),
        ("client.volumes.create(name='other', size_gb=1, region='eu', encrypted=True)", None),
        ("client.volumes.attach(box.id, vol['id'], '/data')", None),
        ("box.stop()", "it.state == 'paused'"),
        ("client.volumes.attach(box.id, vol['id'], '/data')", "(it['volume_id'], it['mount_path']) == (vol['id'], '/data')"),
        ("client.volumes.list_attachments(box.id)", "[a['id'] for a in it] == [vol['id']]"),
        ("client.volumes.delete(vol['id'])", None),
        ("client.volumes.detach(box.id, vol['id'])", None),
        ("client.volumes.delete(vol['id'])", None),
        ("client.volumes.get(vol['id'])", None),
        ("box.resume()", "it.state == 'running'"),
    ],
    "Previews": [
        ("box.preview_token()", None),
        ("preview = box.preview.create(port=8000)", "f'http://8000-{box.id}.localhost' in it['url'] or f'http://8000-{box.name}.localhost' in it['url']"),
        ("box.preview.list()", "[p['id'] for p in it] == [preview['id']]"),
        ("box.preview.get(preview['id'])", "it == preview"),
        ("box.preview.create(port=8000, visibility='public')", "it['id'] == preview['id'] and it['url'].endswith('/')"),
        ("box.preview.create(port=8001, visibility='private', label='app')", "(it['name'], it['visibility']) == ('app', 'private')"),
        ("box.preview.create(port=0)", None),
        ("box.expose(3000)", "'3000-' in it"),
        ("box.expose()", "'8000-' in it"),
        ("box.get_host(3000)", "it.startswith('3000-')"),
        ("box.get_url(3000, '/login')", "'/login?mt=' in it"),
        ("box.preview_token(expires_in=60, scope='read')", "it['scope'] == 'read' and it['url'].endswith(it['token'])"),
        ("box.preview_token(scope='root')", None),
        ("box.preview.share(preview['id'], ttl_seconds=60)", "it['share_url'].endswith(it['preview_token'])"),
        ("box.preview.revoke_share(preview['id'])", None),
        ("box.preview.delete(preview['id'])", None),
        ("box.preview.get(preview['id'])", None),
        ("box.share.create(expires_in=60)", None),
    ],
    "Templates and usage": [
        ("client.runtimes.list()", "[r['runtime_profile'] for r in it] == ['standard']"),
        ("box.metrics()", "(it['state'], it['cpu']['count']) == ('running', box.cpu_count)"),
        ("box.start_template()", None),
        ("box.start_template({'install_command': 'exit 3', 'start_command': 'true', 'port': 8002})", None),
        ("box.start_template({'install_command': 'echo done', 'start_command': serve, 'port': serve_port})",
         "it.preview_url.startswith(f'http://{serve_port}-') and it.data['install']['stdout'] == 'done\\n'"),
        ("box.write_file('/workspace/artifacts/report.md', 'text')", None),
        ("box.get_artifacts()", "list(it.artifacts) == ['/workspace/artifacts/report.md'] and it.preview['port']"),
        ("client.sandboxes.list_templates()", "it['data'][0]['name'] == 'base'"),
        ("client.sandboxes.get_template('base')", "it['data']['name'] == 'base'"),
        ("client.usage.get()", "box.id in [r['sandbox_id'] for r in it['results']] and it['total']['runtime_sec'] > 0"),
        ("client.usage.get(period='7d')", "it['period_start'] < it['period_end'] and any(r['sandbox_id'] == box.id and r['sessions'] > 1 for r in it['results'])"),
        ("client.usage.get(start='2020-01-01T00:00:00Z', end='2020-01-02T00:00:00Z')", "all(r['sessions'] == 0 for r in it['results'])"),
        ("client.usage.get(period='long')", None),
        ("client.usage.get(group_by='workspace_id')", None),
        ("client.usage.current()", "it['running'] > 0 and it['runtime_sec'] > 0"),
        ("client.usage.report(period_start='2020-01-01T00:00:00Z')", "it['period_start'].startswith('2020')"),
        ("client.usage.sessions()", "box.id in [s['sandbox_id'] for s in it]"),
        ("client.usage.sessions(sandbox_id=fork.id, period='1h')", "{s['sandbox_id'] for s in it} <= {fork.id}"),
    ],
    "Other parts of the hosted product": [
        ("box.deploy()", None),
        ("box.ssh_info()", None),
        ("client.computers.list()", None),
        ("client.deployments.list()", None),
        ("client.databases.list()", None),
    ],
    "The end": [
        ("client.sandboxes.delete(fork.id)", None),
        ("box.destroy()", "box.state == 'destroyed'"),
        ("box.update(name='again')", None),
    ],
}


def members(archive):
    """Sizes by name."""
    return {m.name: m.size for m in tarfile.open(fileobj=io.BytesIO(archive)).getmembers()}


async def outcome(call, expected, names):
    """What a call ends in; its value goes where it is assigned to."""
    target, _, expression = call.partition(" = ") if call.split(" = ")[0].isidentifier() else ("it", "", call)
    try:
        value = eval(expression, names)
        if inspect.isawaitable(value):
            value = await value
        # Of a stream the first event.
        if inspect.isgenerator(value):
            stream, value = value, next(value)
            stream.close()
        elif inspect.isasyncgen(value):
            stream, value = value, await anext(value)
            await stream.aclose()
    except MiosaError as error:
        assert error.request_id and error.message, call
        return f"{error.status_code} `{error.code}`"
    names["it"] = names[target] = value
    assert expected is None or eval(expected, names), f"{call}: {expected}: {value!r}"
    return "works"


async def run(names):
    return {s: [(c, await outcome(c, expected, names)) for c, expected in calls] for s, calls in CALLS.items()}


def server():
    """A line for a shell that serves a port which nobody has: guests of the stand-in have this machine's loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"serve": f"exec python3 -m http.server --bind 127.0.0.1 {port}", "serve_port": port}


async def main():
    to = {"api_key": os.environ["MIOSA_TEST_KEY"], "base_url": os.environ["MIOSA_TEST_URL"], "max_retries": 0, "timeout": 120}
    plain, waited = miosa.Miosa(**to), miosa.AsyncMiosa(**to)
    first = await run({"client": plain, "name": "calls", "members": members, **server()})
    second = await run({"client": waited, "name": "calls-async", "members": members, **server()})
    for section, rows in first.items():
        for row, other in zip(rows, second[section]):
            assert row == other, (row, other)
        print(f"### {section}\n\n| call | outcome |\n| --- | --- |")
        for call, ended in rows:
            print(f"| `{call}` | {ended} |")
        print()


asyncio.run(main())
