"""Renders templates with jinja2 (as transformers sets it up) and with Latente, and reports every difference.

    compare_with_jinja2.py PATH_OF_test_tokenizer [--random N] [--seed S] [--record] [--templates DIRECTORY]

Templates: tests/templates/*.jinja with random conversations, tests/templates/snippets.txt, and N random programs;
with --templates DIRECTORY, those of its *.jinja with random conversations instead, and a line for each.
Both must give the same text, or both an error. --record writes tests/templates/recorded.json from jinja2's answers
for the first two kinds and the first 100 random programs. Needs transformers >= 5 and jinja2 3.1.6.
"""
import argparse
import collections
import json
import os
import pathlib
import random
import re
import subprocess
import tempfile
import warnings

from transformers.utils.chat_template_utils import _cached_compile_jinja_template as compile_template

import random_template

# Texts of objects whose spelling holds an address or the name of a Python class.
UNSTABLE = re.compile(r"at 0x|<generator|<built-in|<Macro|<class|LoopContext|<method|<function")
TEMPLATES = pathlib.Path(__file__).parent.parent / "templates"


SNIPPET_CONTEXT = {"messages": [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "yo"}],
                   "bos_token": "<s>", "eos_token": "</s>"}


def expected(request):
    source = request.get("source") or (TEMPLATES / request["file"]).read_text()
    try:
        return {"text": compile_template(source).render(**request["context"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def answers(program, requests):
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = os.path.join(folder, "asked.json"), os.path.join(folder, "answered.json")
        with open(asked, "w") as file:
            json.dump(requests, file, ensure_ascii=False)
        environment = dict(os.environ, LATENTE_TEMPLATE_REQUESTS=asked, LATENTE_TEMPLATE_ANSWERS=answered)
        subprocess.run([program, "--gtest_filter=ChatTemplateOracle.*", "--gtest_brief=1"], env=environment, check=True)
        with open(answered) as file:
            return json.load(file)


def fixed_requests(rng, conversations):
    for path in sorted(TEMPLATES.glob("*.jinja")):
        for _ in range(conversations):
            yield {"file": path.name, "context": random_template.context(rng)}
    for line in (TEMPLATES / "snippets.txt").read_text().split("\n%%\n"):
        yield {"source": line, "context": SNIPPET_CONTEXT}


def published_requests(rng, directory, conversations):
    for path in sorted(pathlib.Path(directory).glob("*.jinja")):
        for _ in range(conversations):
            yield {"source": path.read_text(), "name": path.name, "context": random_template.context(rng)}


def main():
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--random", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--templates")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    if options.templates:
        requests = list(published_requests(rng, options.templates, 12))
    else:
        requests = list(fixed_requests(rng, 8 if options.record else 200))
        fixed = len(requests)
        requests += [random_template.program(rng) for _ in range(options.random)]
    wanted = [expected(request) for request in requests]
    if options.record:
        recorded = [{**request, **want} for request, want in list(zip(requests, wanted))[:fixed + 100]
                    if not UNSTABLE.search(want.get("text", ""))]
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in recorded)
        (TEMPLATES / "recorded.json").write_text("[\n" + lines + "\n]\n")
    got = answers(options.program, requests)
    differing = 0
    rendered = collections.Counter()  # by template: equal texts, errors of both, differences
    for request, want, have in zip(requests, wanted, got):
        name = request.get("name", "")
        rendered[name, "equal" if want.get("text") == have.get("text") else "different"] += 1
        rendered[name, "errors"] += "error" in want
        if want.get("text") == have.get("text") or UNSTABLE.search(want.get("text", "")):
            continue
        differing += 1
        if differing <= options.show:
            print("--- " + (request.get("file") or request.get("name") or request["source"]))
            if len(request["source"] if "source" in request else "x" * 999) < 200 or "file" in request:
                print("  context: " + json.dumps(request["context"], ensure_ascii=False)[:600])
            print(f"  jinja2:  {json.dumps(want, ensure_ascii=False)}\n  latente: {json.dumps(have, ensure_ascii=False)}")
    for name in sorted({name for name, _ in rendered} - {""}):
        print(f"{name}: {rendered[name, 'equal']} equal, {rendered[name, 'errors']} of them errors, "
              f"{rendered[name, 'different']} different")
    failing = sum("error" in want for want in wanted)
    print(f"{len(requests)} renderings, {failing} of them errors in jinja2, {differing} differ")
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()
