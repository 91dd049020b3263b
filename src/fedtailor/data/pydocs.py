"""`pydocs`: a real data set that every Python carries: first sentences of the standard library's docstrings, by chapter.

About 7,700 texts (Python 3.11) in 10 classes; the column `module` makes natural clients. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# The library reference's chapters, neighbours merged to ten classes.
CHAPTERS: dict[str, str] = {
    "text and data types": """string re difflib textwrap unicodedata stringprep readline rlcompleter struct codecs encodings datetime
        zoneinfo calendar collections _collections_abc heapq bisect array weakref _weakrefset types copy pprint reprlib enum graphlib
        _strptime _pydatetime sre_compile sre_parse sre_constants copyreg""",
    "numbers and functions": """numbers math cmath decimal _pydecimal fractions random statistics itertools functools operator""",
    "files and storage": """pathlib os posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache shutil pickle
        pickletools shelve marshal dbm sqlite3 zlib gzip bz2 lzma zipfile tarfile _compression csv configparser tomllib netrc plistlib xdrlib
        macpath""",
    "operating system": """io _pyio time argparse optparse getopt logging getpass curses platform errno ctypes signal mmap pty tty pipes
        subprocess posix pwd sched crypt syslog _osx_support _aix_support webbrowser""",
    "concurrency": """threading _threading_local multiprocessing concurrent queue contextvars asyncio dummy_threading _dummy_thread""",
    "networking and internet": """socket ssl select selectors asyncore asynchat smtpd urllib http ftplib poplib imaplib nntplib smtplib
        telnetlib socketserver xmlrpc ipaddress cgi cgitb wsgiref uuid hashlib hmac secrets""",
    "markup and messages": """html xml _markupbase email json mailcap mailbox mimetypes base64 binhex binascii quopri uu""",
    "interfaces and media": """tkinter turtle turtledemo idlelib wave aifc sunau chunk colorsys imghdr sndhdr ossaudiodev gettext locale cmd
        shlex""",
    "development and packaging": """typing pydoc doctest unittest test 2to3 lib2to3 pdb bdb faulthandler profile pstats cProfile timeit trace
        tracemalloc distutils ensurepip venv zipapp pyclbr py_compile compileall tabnanny tokenize token keyword symtable ast dis
        opcode""",
    "runtime": """sys sysconfig builtins warnings dataclasses contextlib abc _abc _py_abc atexit traceback gc inspect site code codeop zipimport
        pkgutil modulefinder runpy importlib __future__ _bootlocale _sitebuiltins nturl2path antigravity this imp""",
}
SKIPPED = {"site-packages", "test", "tests", "__pycache__", "idle_test", "lib-dynload", "config"}
LABELS = sorted(CHAPTERS)


def pydocs() -> dict[str, list[object]]:
    """Docstrings of the installed Python's standard library, 10 classes: the reference's chapters. Clients: column "module"."""
    chapter = {module: LABELS.index(name) for name in LABELS for module in CHAPTERS[name].split()}
    root = Path(sysconfig.get_paths()["stdlib"])
    columns: dict[str, list[object]] = {"text": [], "label": [], "module": []}
    seen: set[str] = set()
    packages = [p for p in root.iterdir() if p.is_dir() and p.name in chapter]
    files = [p for p in root.glob("*.py") if p.stem in chapter] + [p for package in packages for p in package.rglob("*.py")]
    for path in sorted(files):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if SKIPPED & set(parts[:-1]):
            continue
        for text in _sentences(path):
            if text not in seen:
                seen.add(text)
                for name, value in zip(columns, (text, chapter[module], module), strict=True):
                    columns[name].append(value)
    return columns


def _sentences(path: Path) -> Iterator[str]:
    """The first sentence of each docstring of a source file; three words at least, so that there is something to read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the library's own strings
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:  # the library ships files that are wrong on purpose
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = " ".join(paragraph.split()).split(". ")[0].rstrip(".")
            if len(text.split()) >= 3 and not text.startswith(">>>"):
                yield text


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """What `ast.walk` yields, in its order, without the expressions: they are most of a tree and hold no docstring."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            below = getattr(node, part, None)
            todo.extend(below if isinstance(below, list) else ())
