"""Hostile programs, run for real: the host is unharmed, the sandbox is gone, the verdict stays outside."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from domains.config import SandboxConfig
from domains.sandbox.cases import run_cases, strictly_equal
from domains.sandbox.sandbox import Completed, Sandbox, SandboxUnavailable

SECRET = f"honeypot-7c1f5e-{os.getpid()}"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """A real sandbox, or a skip that says why there is none."""
    try:
        return Sandbox(SandboxConfig(timeout_s=0.5, memory_mib=256))
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A secret in our environment and in a file that anybody on the host may read."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    path = Path(f"/tmp/{SECRET}.txt")
    path.write_text(SECRET)
    path.chmod(0o666)
    yield path
    path.unlink()


def attack(sandbox: Sandbox, program: str, *, timeout_s: float = 0.5) -> Completed:
    """Run a hostile program and assert that none of its processes is alive a second later."""
    prelude = "import os as _os; _os.write(RESULT_FD, _os.readlink('/proc/self/ns/pid').encode())\n"
    completed = sandbox.run(prelude + program, timeout_s=timeout_s)
    namespace = completed.result.decode(errors="replace")
    assert namespace.startswith("pid:["), completed
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    while leftovers := _alive(namespace, before_s=ended):
        assert time.clock_gettime(time.CLOCK_BOOTTIME) < ended + 1.0, f"still alive: {leftovers}"
        time.sleep(0.02)
    return completed


def _alive(namespace: str, *, before_s: float) -> list[int]:
    """Processes of a pid namespace that began before a moment; a later owner of the same number is not ours."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if not os.readlink(f"/proc/{name}/ns/pid").startswith(namespace):
                continue
            ticks = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[19])
        except OSError:
            continue
        if ticks / os.sysconf("SC_CLK_TCK") < before_s:
            found.append(int(name))
    return found


RESOURCES = {
    "infinite_loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(100)", {"timeout"}),
    "ignore_signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        {"timeout"},
    ),
    "infinite_stdout": ("while True: print('x' * 10000)", {"crash"}),
    "infinite_stderr": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {"crash"}),
    "infinite_result": ("import os\nwhile True: os.write(RESULT_FD, b'x' * 10000)", {"crash"}),
    "close_all_descriptors": ("import os\nos.closerange(0, 64)\nwhile True: pass", {"timeout"}),
    "fork_bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"timeout", "memory"}),
    "fork_storm_dying": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: pass",
        {"timeout", "memory"},
    ),
    "thread_bomb": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "    except RuntimeError: pass",
        {"timeout", "memory"},
    ),
    "daemonise": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(100)\n    os._exit(0)\nos.wait()",
        {"ok"},
    ),
    "memory_bytes": ("b'x' * 10**10", {"memory"}),
    "memory_slowly": ("a = []\nwhile True: a.append(bytearray(1 << 20))", {"memory"}),
    "memory_nested_lists": ("a = []\nwhile True: a = [a, a[:], [a] * 99]", {"memory", "timeout"}),
    "memory_forks": (
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n        a = b'x' * 150_000_000\n        time.sleep(9)\n"
        "time.sleep(9)",
        {"memory"},
    ),
    "memory_forks_undumpable": (
        "import ctypes, os, time\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\nfor _ in range(12):\n    if os.fork() == 0:\n"
        "        a = b'x' * 150_000_000\n        time.sleep(9)\ntime.sleep(9)",
        {"memory"},
    ),
    "memory_memfd": ("import os\nos.memfd_create('x')", {"crash"}),
    "memory_sysv_shm": ("import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) >= 0", {"crash"}),
    "memory_message_queue": ("import ctypes\nassert ctypes.CDLL(None).msgget(0, 0o1600) >= 0", {"crash"}),
    "memory_pipes": (
        "import fcntl, os\nwhile True:\n    r, w = os.pipe()\n    fcntl.fcntl(w, 1031, 1 << 20)\n    os.write(w, b'x' * (1 << 20))",
        {"crash", "timeout"},
    ),
    "fill_tmp": ("for i in range(100): open(f'/tmp/{i}', 'wb').write(b'x' * (8 << 20))", {"crash"}),
    "fill_shm": ("for i in range(100): open(f'/dev/shm/{i}', 'wb').write(b'x' * (2 << 20))", {"crash"}),
    "one_large_file": ("open('/tmp/x', 'wb').truncate(1 << 40)", {"crash"}),
    "inode_bomb": ("i = 0\nwhile True:\n    open(f'/tmp/{i}', 'w').close()\n    i += 1", {"memory", "timeout"}),
    "descriptor_bomb": ("a = [open('/dev/null') for _ in range(10000)]", {"crash"}),
    "deep_recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()", {"crash", "memory", "timeout"}),
    "deep_repr": ("a = []\nfor _ in range(10**5): a = [a]\nrepr(a)", {"crash", "memory"}),
    "zip_bomb": ("import zlib\nz = zlib.compress(bytes(1 << 26))\nb''.join(zlib.decompress(z) for _ in range(64))", {"memory", "timeout"}),
    "regex": ("import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", {"timeout"}),
    "integer_power": ("9 ** 9 ** 9", {"timeout", "memory"}),
    "integer_text": ("int('9' * 10**7)", {"crash"}),
    "segfault": ("import ctypes\nctypes.string_at(0)", {"crash"}),
    "abort": ("import os\nos.abort()", {"crash"}),
    "raise_limits": (
        "import resource\nfor n in ('AS', 'NPROC', 'FSIZE', 'NOFILE', 'CPU'):\n"
        "    resource.setrlimit(getattr(resource, 'RLIMIT_' + n), (1 << 40, 1 << 40))",
        {"crash"},
    ),
}


@pytest.mark.parametrize(("program", "statuses"), RESOURCES.values(), ids=RESOURCES.keys())
def test_resource_attack_ends_within_its_limits(sandbox: Sandbox, program: str, statuses: set[str]) -> None:
    completed = attack(sandbox, program, timeout_s=0.5 if "timeout" in statuses else 10.0)
    assert completed.status in statuses, completed
    assert len(completed.stdout) <= 1 << 20
    assert completed.ms < 15_000


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ESCAPES = {
    "write_root": "return open('/owned', 'w')",
    "write_usr": "return open('/usr/owned', 'w')",
    "write_dev": "return open('/dev/owned', 'w')",
    "write_etc": "return open('/etc/owned', 'w')",
    "write_job_dir_above": "return open('/tmp/../owned', 'w')",
    "read_shadow": "return open('/etc/shadow').read()",
    "read_passwd": "return open('/etc/passwd').read()",
    "read_home": "return os.listdir('/root')",
    "read_hosts_home": "return os.listdir('/home')",
    "read_host_tmp": f"return open('/tmp/{SECRET}.txt').read()",
    "read_host_through_proc": f"return open('/proc/1/root/tmp/{SECRET}.txt').read()",
    "read_host_through_cwd": f"return open('/proc/1/cwd/{SECRET}.txt').read()",
    "symlink_out": f"os.symlink('/proc/1/root/../../tmp/{SECRET}.txt', 'link'); return open('link').read()",
    "hard_link": "os.link('/usr/bin/python3', '/tmp/python'); return True",
    "other_processes": "return len([p for p in os.listdir('/proc') if p.isdigit()]) > 1",
    "secret_in_any_environment": (
        f"return any({SECRET!r} in open(f'/proc/{{p}}/environ').read() for p in os.listdir('/proc') if p.isdigit())"
    ),
    "secret_in_own_environment": f"return {SECRET!r} in str(os.environ)",
    "host_paths_in_cmdline": "return any(w in open('/proc/1/cmdline').read() for w in ('bwrap', 'setpriv', '--ro-bind', '.venv'))",
    "inherited_descriptors": "return any(os.path.exists(f'/proc/self/fd/{n}') for n in range(3, 64) if n != RESULT_FD)",
    "reopen_result_for_reading": "return os.read(os.open(f'/proc/self/fd/{RESULT_FD}', os.O_RDONLY | os.O_NONBLOCK), 9)",
    "dev_mem": "return open('/dev/mem', 'rb')",
    "dev_kvm": "return open('/dev/kvm', 'rb')",
    "disks": "return [n for n in os.listdir('/dev') if n.startswith(('sd', 'vd', 'nvme', 'loop'))]",
    "sysfs": "return os.listdir('/sys')",
    "core_pattern": "return open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')",
    "sysrq": "return open('/proc/sysrq-trigger', 'w').write('b')",
    "oom_score": "return os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000')",
    "become_root": "os.setuid(0); return True",
    "setuid_binary": "import subprocess; return subprocess.run(['/usr/bin/su', '-c', 'id'], capture_output=True).returncode == 0",
    "user_namespace": "return libc.unshare(0x10000000) == 0",
    "user_namespace_by_clone": "return libc.syscall(NR['clone'], 0x10000000 | 17, 0, 0, 0, 0) >= 0",
    "user_namespace_by_clone3": "a = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17); return libc.syscall(435, a, 64) >= 0",
    "mount": "return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "remount_writable": "return libc.mount(b'none', b'/usr', None, 0x1020, None) == 0",
    "chroot": "os.chroot('/tmp'); return True",
    "ptrace": "return libc.ptrace(0, 0, 0, 0) == 0",
    "read_other_memory": "return libc.syscall(NR['process_vm_readv'], 1, 0, 0, 0, 0, 0) >= 0",
    "kcmp": "return libc.syscall(NR['kcmp'], 1, 1, 0, 0, 0) >= 0",
    "io_uring": "return libc.syscall(425, 8, ctypes.create_string_buffer(256)) >= 0",
    "bpf": "return libc.syscall(NR['bpf'], 0, ctypes.create_string_buffer(128), 128) >= 0",
    "perf_events": "return libc.syscall(NR['perf_event_open'], ctypes.create_string_buffer(128), 0, -1, -1, 0) >= 0",
    "kernel_keyring": "return libc.syscall(NR['add_key'], b'user', b'x', b'y', 1, -3) >= 0",
    "device_node": "os.mknod('/tmp/mem', 0o20666, os.makedev(1, 1)); return True",
    "type_into_terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); return True",
    "outlive_the_parent": "return libc.prctl(1, 0, 0, 0, 0) == 0",
    "set_the_clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); return True",
    "kill_init": "os.kill(1, 9); time.sleep(0.05); return False",
    "kill_parent": "return os.getppid() != 0",
    "kill_everybody": "import signal; os.kill(-1, signal.SIGKILL); return False",
}
NUMBERS = {
    "clone": (56, 220),
    "process_vm_readv": (310, 270),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
}
NETWORK = {
    "tcp_loopback": "s = socket.create_connection(('127.0.0.1', PORT), 0.2); return True",
    "tcp_ipv6": "s = socket.socket(socket.AF_INET6); s.connect(('::1', PORT)); return True",
    "udp": "s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', PORT)); return True",
    "unix_abstract": f"s = socket.socket(socket.AF_UNIX); s.connect('\\0{SECRET}'); return True",
    "unix_pair": "socket.socketpair(); return True",
    "vsock": "s = socket.socket(socket.AF_VSOCK); return True",
    "netlink": "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); return True",
    "raw": "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); return True",
    "dns": "return socket.getaddrinfo('example.com', 80)",
    "cloud_metadata": "import urllib.request; return urllib.request.urlopen('http://169.254.169.254/', timeout=0.2).read()",
    "ray_jobs": "import urllib.request; return urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/', timeout=0.2).read()",
    "listen": "s = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); return True",
    "host_interfaces": "return [n for n in open('/proc/net/dev').read().split() if n.endswith(':') and n != 'lo:']",
}


def attempt(body: str, port: int = 0) -> str:
    """Wrap an attempt: prints ESCAPED where it succeeds, BLOCKED where it is refused."""
    column = 0 if os.uname().machine == "x86_64" else 1
    numbers = {name: pair[column] for name, pair in NUMBERS.items()}
    return (
        f"import os, socket, time\n{LIBC}NR, PORT = {numbers!r}, {port}\n"
        f"def attempt():\n    {body}\n"
        "try:\n    print('ESCAPED' if attempt() else 'BLOCKED', flush=True)\n"
        "except OSError as error:\n    print('BLOCKED', error.errno, flush=True)\n"
    )


@pytest.mark.parametrize("body", ESCAPES.values(), ids=ESCAPES.keys())
def test_escape_is_blocked(sandbox: Sandbox, secret: Path, body: str) -> None:
    completed = attack(sandbox, attempt(body), timeout_s=3.0)
    assert b"BLOCKED" in completed.stdout, completed
    assert b"ESCAPED" not in completed.stdout
    assert SECRET.encode() not in completed.stdout
    assert secret.read_text() == SECRET
    assert not [place for place in ("/", "/usr", "/dev", "/etc") if Path(place, "owned").exists()]


@pytest.mark.parametrize("body", NETWORK.values(), ids=NETWORK.keys())
def test_network_is_out_of_reach(sandbox: Sandbox, body: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{SECRET}")
        abstract.listen()
        completed = attack(sandbox, attempt(body, server.getsockname()[1]), timeout_s=3.0)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert b"BLOCKED" in completed.stdout, completed
    assert b"ESCAPED" not in completed.stdout


SPRAY = "import os\ndef f(x):\n    for fd in range(0, 64):\n        try: os.write(fd, b'%s')\n        except OSError: pass\n    %s"
TAMPERING = {
    "exit_at_import": "import sys; sys.exit(0)",
    "hard_exit_at_import": "import os; os._exit(0)",
    "system_exit": "raise SystemExit",
    "keyboard_interrupt": "raise KeyboardInterrupt",
    "skip_test": "import unittest; raise unittest.SkipTest('pass')",
    "exit_in_call": "import sys\ndef f(x): sys.exit(0)",
    "hard_exit_in_call": "import os\ndef f(x): os._exit(0)",
    "kill_itself": "import os\ndef f(x): os.kill(0, 9); os.abort()",
    "exit_like_our_failure": "import os\nos._exit(1)",
    "exit_like_a_limit": "import os\nos._exit(77)",
    "exec_away": "import os\ndef f(x): os.execv('/usr/bin/true', ['true'])",
    "close_the_result": "import os\nos.closerange(0, 64)\ndef f(x): return x * 2",
    "atexit": "import atexit, os\natexit.register(os.write, 1, b'PASS')\ndef f(x): return 0",
    "print_pass": "print('PASS ok 1 passed')\ndef f(x):\n    print('{\"ok\": true}')\n    return 0",
    "always_equal": (
        "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __hash__(self): return 0\ndef f(x): return E()"
    ),
    "int_subclass": "class E(int):\n    def __eq__(self, o): return True\ndef f(x): return E(0)",
    "str_subclass": "class E(str):\n    def __eq__(self, o): return True\ndef f(x): return E('')",
    "list_subclass": "class E(list):\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "class_lies": "class E:\n    __class__ = int\n    def __index__(self): return 2\ndef f(x): return E()",
    "not_a_number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "bool_for_int": "def f(x): return x * 2 if x != 1 else True",
    "float_for_int": "def f(x): return float(x * 2)",
    "text_for_int": "def f(x): return str(x * 2)",
    "nothing": "def f(x): return None",
    "echo": "def f(x): return x",
    "infinite_generator": "def f(x):\n    while True: yield x * 2",
    "lazy_object": "class E(dict):\n    def items(self): return [('a', 1)]\ndef f(x): return E()",
    "huge_answer": "def f(x): return 'x' * (1 << 22)",
    "deep_answer": "def f(x):\n    a = []\n    for _ in range(500): a = [a]\n    return a",
    "cyclic_answer": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "big_integer": "def f(x): return 1 << 100000",
    "pickle_payload": "import pickle\ndef f(x): return pickle.dumps(x)",
    "wrong_name": "def g(x): return x * 2",
    "not_callable": "f = 4",
    "syntax_error": "def f(x) return x * 2",
    "null_byte": "def f(x): return x * 2\0",
    "lone_surrogate": "def f(x): return '\udce9'",
    "empty": "",
    "monkeypatch_builtins": "import builtins\nbuiltins.len = builtins.type = builtins.isinstance = lambda *a: True\ndef f(x): return 0",
    "monkeypatch_json": "import json\njson.dumps = lambda *a, **k: '[\"case\", true, 4]'\ndef f(x): return 0",
    "monkeypatch_type": "import builtins\nbuiltins.type = lambda v: int\nclass E: pass\ndef f(x): return E()",
    "walk_frames_for_answers": (
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    return frame.f_locals.get('expected', frame.f_globals.get('expected'))"
    ),
    "collect_answers": (
        "import gc\ndef f(x): return next((o['expected'] for o in gc.get_objects() if type(o) is dict and 'expected' in o), 0)"
    ),
    "read_stdin": "import sys\ndef f(x): return sys.stdin.read()",
    "trace_hook": "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return 0",
    "thread_writes_later": "import os, threading\nthreading.Timer(0.05, os.write, (1, b'PASS')).start()\ndef f(x): return 0",
    "damage_the_stream": SPRAY % ("garbage\\n", "return x * 2"),
    "forge_end_of_stream": SPRAY % ('["end", ""]\\n', "os._exit(0)"),
    "forge_too_many": SPRAY
    % ('["case", true, 2]\\n["case", true, 2]\\n["case", true, 2]\\n["case", true, 2]\\n["end", ""]\\n', "os._exit(0)"),
    "forge_not_a_number": SPRAY % ('["case", true, NaN]\\n', "os._exit(0)"),
    "forge_deep_json": SPRAY % ("[" * 3000 + "\\n", "os._exit(0)"),
    "exception_that_exits": "class E(Exception):\n    def __str__(self): import os; os._exit(0)\ndef f(x): raise E()",
    "exception_that_loops": "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(x): raise E()",
    "answer_after_first_case": "def f(x):\n    if x == 1: return 2\n    while True: pass",
}
INPUTS, EXPECTED = [[1], [2], [21]], [2, 4, 42]


@pytest.mark.parametrize("source", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_earns_no_right_verdict(sandbox: Sandbox, source: str) -> None:
    results = run_cases(sandbox, source, "f", INPUTS)
    right = [output.ok and strictly_equal(output.value, expected) for output, expected in zip(results.outputs, EXPECTED, strict=True)]
    assert not all(right) or results.status != "ok", results
    assert results.status != "infrastructure", results
    assert len(results.outputs) == len(INPUTS)


def test_an_honest_candidate_is_right(sandbox: Sandbox) -> None:
    results = run_cases(sandbox, "def f(x):\n    print('debugging')\n    return x * 2", "f", INPUTS)
    assert results.status == "ok"
    assert [output.value for output in results.outputs] == EXPECTED


def test_a_forger_answers_for_itself_only(sandbox: Sandbox) -> None:
    """Two candidates run at once: the forged stream of one says nothing about the other."""
    forged: list[str] = []
    thread = threading.Thread(target=lambda: forged.append(run_cases(sandbox, TAMPERING["forge_too_many"], "f", INPUTS).status))
    thread.start()
    honest = run_cases(sandbox, "def f(x): return x * 2", "f", INPUTS)
    thread.join()
    assert honest.status == "ok"
    assert [output.value for output in honest.outputs] == EXPECTED
    assert forged == ["crash"]


@pytest.mark.parametrize("name", ["fork_bomb", "memory_forks", "inode_bomb", "infinite_stdout"])
def test_other_slots_do_not_notice(sandbox: Sandbox, name: str) -> None:
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(attack(sandbox, RESOURCES[name][0], timeout_s=0.6).status))
    thread.start()
    statuses = [sandbox.run("print(sum(range(1000)))", timeout_s=5.0).status for _ in range(5)]
    thread.join()
    assert statuses == ["ok"] * 5
    assert done and done[0] in RESOURCES[name][1]


def test_two_sandboxes_share_no_directory(sandbox: Sandbox) -> None:
    program = (
        "import os, time\nfor d in ('/tmp', '/dev/shm'):\n    print(os.listdir(d))\n    open(d + '/mark', 'w').close()\ntime.sleep(0.2)"
    )
    outputs: list[bytes] = []
    threads = [threading.Thread(target=lambda: outputs.append(attack(sandbox, program, timeout_s=3.0).stdout)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == [b"[]\n[]\n"] * 2
