"""What runs in a sandbox while its memory is kept, and `look`, which tells how they are, as one line of JSON.

Each program ends with an error when anything is lost or goes back.
"""

import hashlib, json, os, socket, sqlite3, sys, time

DATABASE, COUNT, COMMITTED = "/workspace/numbers", "/dev/shm/count", "/dev/shm/committed"


def tell(path, number):
    with open(path + ".new", "w") as file:
        file.write(str(number))
    os.rename(path + ".new", path)


def told(path):
    with open(path) as file:
        return int(file.read())


def counter():
    number, last = 0, time.monotonic()
    while True:
        number += 1
        tell(COUNT, number)
        print(number, flush=True)
        time.sleep(0.05)
        now = time.monotonic()
        if now < last or told(COUNT) != number:
            sys.exit(f"{now} after {last}, {told(COUNT)} is not {number}")
        last = now


def holder():
    """Has a file that no directory names, and reads it from the disk."""
    content = os.urandom(1 << 20)
    file = os.open("/workspace/deleted", os.O_RDWR | os.O_CREAT)
    os.write(file, content)
    os.fsync(file)
    os.unlink("/workspace/deleted")
    digest = hashlib.sha256(content).digest()
    del content
    reads = 0
    while True:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if hashlib.sha256(os.pread(file, 2 << 20, 0)).digest() != digest:
            sys.exit("the deleted file has changed")
        reads += 1
        tell("/dev/shm/reads", reads)
        time.sleep(0.2)


def server():
    """Says how often it was asked, which only its memory knows."""
    listener = socket.create_server(("127.0.0.1", 8000))
    asked = 0
    while True:
        connection, _ = listener.accept()
        asked += 1
        connection.sendall(str(asked).encode())
        connection.close()


def writer():
    """Puts 1, 2, 3 and so on into a database."""
    db = sqlite3.connect(DATABASE, isolation_level=None, timeout=60)
    db.execute("PRAGMA journal_mode = " + sys.argv[2])
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE IF NOT EXISTS numbers (n INTEGER PRIMARY KEY, filler BLOB)")
    number = db.execute("SELECT coalesce(max(n), 0) FROM numbers").fetchone()[0]
    while True:
        db.execute("BEGIN IMMEDIATE")
        for _ in range(5):
            number += 1
            db.execute("INSERT INTO numbers VALUES (?, ?)", (number, os.urandom(200)))
        db.execute("COMMIT")
        tell(COMMITTED, number)
        time.sleep(0.02)


def database():
    """What is in it, which is all of 1 to n."""
    db = sqlite3.connect(DATABASE, timeout=60)
    integrity = db.execute("PRAGMA integrity_check").fetchone()[0]
    rows, first, last = db.execute("SELECT count(*), min(n), max(n) FROM numbers").fetchone()
    return {"integrity": integrity, "rows": rows, "gapless": rows == 0 or (first, last) == (1, rows)}


def check():
    print(json.dumps(database()))


def look():
    committed = told(COMMITTED)
    found = database()
    with socket.create_connection(("127.0.0.1", 8000)) as connection:
        asked = int(connection.recv(100))
    with open("/etc/machine-id") as machine_id, open("/sys/class/net/eth0/address") as mac:
        own = [machine_id.read().strip(), socket.gethostname(), mac.read().strip(), os.urandom(16).hex()]
    print(json.dumps({
        "count": told(COUNT), "reads": told("/dev/shm/reads"), "asked": asked, "committed": committed, **found,
        "clock": time.time(), "own": own,
    }))


globals()[sys.argv[1]]()
