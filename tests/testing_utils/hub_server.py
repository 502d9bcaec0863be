"""A Hub on loopback that speaks the protocol of the real `huggingface_hub` client: repositories, commits, LFS, faults.

with HubServer() as hub:
    subprocess.run([...], env=os.environ | hub.environment(cache_dir))
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_localTestTokenThatMustNeverBePrinted"
PIPELINE_TAGS = ("unconditional-image-generation", "text-to-image", "image-classification")
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".png")


@dataclass
class Repo:
    """Branches of file trees, and every commit by its hash."""

    private: bool = False
    commits: dict = field(default_factory=dict)  # hash -> {path: content}
    branches: dict = field(default_factory=dict)  # name -> hash

    def commit(self, branch, files):
        stamp = f"{len(self.commits)}{sorted(files)}{time.time_ns()}"
        sha = hashlib.sha1(stamp.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision):
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else (None, None)


class HubServer(ThreadingHTTPServer):
    """Serves on a free port until the `with` block ends; `fail` plans faults."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos, self.objects, self.requests, self.faults = {}, {}, [], []
        self.tokens = set()
        self.lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, home, token=TOKEN):
        """Variables that point a fresh process at this server."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def fail(self, method, pattern, kind, times=1):
        """The next that match are answered with a status or (content, status, headers), or cut off (`"drop"`)."""
        self.faults += [(method, re.compile(pattern), kind)] * times

    def files(self, repo_id, revision="main"):
        """What is in a repository: path -> content."""
        return self.repos["models", repo_id].resolve(revision)[1]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def do_PUT(self):
        self.route("PUT")

    def route(self, method):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.inject_fault(method, path):
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        writes = method in ("POST", "PUT") and not path.endswith("validate-yaml")
        guarded = (writes or path.endswith("whoami-v2")) and not path.startswith("/lfs/")
        if guarded and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply_json({"error": "Invalid username or password."}, 401)
        for verbs, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verbs:
                with self.server.lock:
                    return handler(self, **match.groupdict())
        self.reply_json({"error": f"no route {method} {path}"}, 404, {"X-Error-Code": "EntryNotFound"})

    def inject_fault(self, method, path):
        for fault in self.server.faults:
            if fault[0] == method and fault[1].search(path):
                self.server.faults.remove(fault)
                if fault[2] == "drop":
                    self.rfile.read(min(1024, int(self.headers.get("Content-Length") or 0)))
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    answer = fault[2] if isinstance(fault[2], tuple) else ({"error": "planned fault"}, fault[2])
                    self.reply(answer[0], *answer[1:]) if isinstance(answer[0], bytes) else self.reply_json(*answer)
                return True
        return False

    def reply(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value, status=200, headers=None):
        self.reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def repo(self, kind, repo_id):
        repo = self.server.repos.get((kind, repo_id))
        if repo is None:
            self.reply_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return repo

    def tree(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        if repo is None:
            return None, None
        sha, files = repo.resolve(revision)
        if sha is None:
            self.reply_json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return sha, files

    def create_repo(self):
        request = json.loads(self.body)
        name = request["name"] if not request.get("organization") else f"{request['organization']}/{request['name']}"
        repo_id = name if "/" in name else f"user/{name}"
        kind = f"{request.get('type') or 'model'}s"
        known = (kind, repo_id) in self.server.repos
        if not known:
            repo = self.server.repos[kind, repo_id] = Repo(private=request.get("visibility") == "private")
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        self.reply_json({"url": url, "id": repo_id, "name": repo_id}, 409 if known else 200)

    def create_branch(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        if repo is not None:
            repo.branches[revision] = repo.branches["main"]
            self.reply_json({})

    def preupload(self, kind, repo_id, revision):
        if self.tree(kind, repo_id, revision)[0] is not None:
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.reply_json({"files": answers})

    def lfs_batch(self, repo_id):
        answers = []
        for entry in json.loads(self.body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/lfs/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        self.reply_json({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply_json({"error": "checksum"}, 400)
        self.server.objects[oid] = self.body
        self.reply(b"")

    def lfs_verify(self, oid):
        self.reply_json({}, 200 if oid in self.server.objects else 404)

    def make_commit(self, kind, repo_id, revision):
        sha, files = self.tree(kind, repo_id, revision)
        if sha is None:
            return
        files = dict(files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        proposal = "create_pr=1" in urlsplit(self.path).query
        sha = self.server.repos[kind, repo_id].commit("refs/pr/1" if proposal else revision, files)
        answer = {"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "hookOutput": ""}
        if proposal:
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo_id}/discussions/1"
        self.reply_json(answer)

    def info(self, kind, repo_id, revision="main"):
        sha, files = self.tree(kind, repo_id, revision)
        if sha is not None:
            siblings = [{"rfilename": path} for path in files]
            self.reply_json({"id": repo_id, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def list_tree(self, kind, repo_id, revision, folder=None):
        sha, files = self.tree(kind, repo_id, revision)
        if sha is not None:
            chosen = {path: content for path, content in files.items() if path.startswith(folder or "")}
            self.reply_json(
                [{"type": "file", "path": path, **blob(path, content)} for path, content in chosen.items()]
            )

    def resolve(self, repo_id, revision, path, kind="models"):
        sha, files = self.tree(kind, repo_id, revision)
        if sha is None:
            return
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self.reply_json({"error": "Entry not found"}, 404, headers)
        content, details = files[path], blob(path, files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{details["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in details:
            headers |= {"X-Linked-Etag": f'"{details["lfs"]["oid"]}"', "X-Linked-Size": len(content)}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            return self.reply(content, 200, headers)
        start, end = int(span[1]), int(span[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.reply(content[start : end + 1], 206, headers)

    def whoami(self):
        self.reply_json({"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self):
        self.reply_json({"errors": [{"message": error} for error in card_errors(self.body)], "warnings": []})


def blob(path, content):
    """A file's entry in a tree."""
    details = {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if path.endswith(LFS_ENDINGS):
        details["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return details


def card_errors(body):
    """The rules of the Hub that a card of ours could break."""
    content = json.loads(body)["content"]
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["no metadata"]
    errors = [
        f'"{name}" must be a string' for name in ("license", "library_name") if not isinstance(data.get(name, ""), str)
    ]
    if data.get("pipeline_tag", PIPELINE_TAGS[0]) not in PIPELINE_TAGS:
        errors.append('"pipeline_tag" is unknown')
    for name in ("tags", "datasets"):
        if not all(isinstance(entry, str) for entry in data.get(name) or []):
            errors.append(f'"{name}" must be a list of strings')
    for index, model in enumerate(data.get("model-index") or []):
        for result in model.get("results") or [{}]:
            for needed in ("task", "dataset", "metrics"):
                if needed not in result:
                    errors.append(f'"model-index[{index}].results" lacks "{needed}"')
    return errors


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets|spaces)"
ROUTES = (
    (("POST",), "/api/repos/create", HubHandler.create_repo),
    (("POST",), "/api/validate-yaml", HubHandler.validate_yaml),
    (("GET",), "/api/whoami-v2", HubHandler.whoami),
    (("POST",), f"/api/{KIND}/{REPO}/branch/(?P<revision>.+)", HubHandler.create_branch),
    (("POST",), f"/api/{KIND}/{REPO}/preupload/(?P<revision>.+)", HubHandler.preupload),
    (("POST",), f"/api/{KIND}/{REPO}/commit/(?P<revision>.+)", HubHandler.make_commit),
    (("GET",), f"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", HubHandler.list_tree),
    (("GET",), f"/api/{KIND}/{REPO}/revision/(?P<revision>.+)", HubHandler.info),
    (("GET",), f"/api/{KIND}/{REPO}", HubHandler.info),
    (("POST",), rf"/(?:datasets/|spaces/)?{REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_put),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})/verify", HubHandler.lfs_verify),
    (("GET", "HEAD"), f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubHandler.resolve),
)
