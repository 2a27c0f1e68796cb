#!/usr/bin/env python3
"""The page at / in a headless Chromium, driven by Playwright; without them it skips. With SHOTS=FOLDER in the environment
it leaves pictures there.
Usage: serve_page.py LATENTE REFERENCE_MODELS [unittest's arguments]"""

import os
import pathlib
import shutil
import sys
import unittest

import commands_test as commands
import serve_test

try:
    from playwright import sync_api as playwright
except ImportError:
    playwright = None
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "sk-page"
setUpModule, tearDownModule = serve_test.setUpModule, serve_test.tearDownModule


@unittest.skipUnless(playwright and CHROMIUM, "no Playwright, or no Chromium")
class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.driver = playwright.sync_playwright().start()
        cls.addClassCleanup(cls.driver.stop)
        cls.browser = cls.driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        self.server = serve_test.Server("--api-key", KEY, "--ctx-size", 200000, "--cache-tokens", 250000)
        self.addCleanup(self.server.__exit__)
        context = self.browser.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light")
        self.addCleanup(context.close)
        self.page, self.said = context.new_page(), []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(f"http://127.0.0.1:{self.server.port}/")
        self.wait("document.getElementById('model').textContent.includes('API key')")
        self.said.clear()  # that it had no key
        self.set(key=KEY, temperature="0", max_tokens="60")
        self.wait("document.getElementById('model').textContent == 'chat'")

    def wait(self, holds):
        # The page's content security policy forbids Playwright's own way.
        commands.wait_for(lambda: self.page.evaluate(holds), holds)

    def set(self, **options):
        self.page.click("#settings")
        for name, value in options.items():
            self.page.fill(f"[name={name}]", value)
        self.page.click("dialog button")

    def ends(self):
        self.wait("document.getElementById('send').textContent == 'Send'")

    def write(self, text):
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        self.wait("document.querySelector('.message.user')")
        self.ends()

    def count(self, what):
        return self.page.locator(what).count()

    def shot(self, name):
        if "SHOTS" in os.environ:
            self.page.screenshot(path=pathlib.Path(os.environ["SHOTS"]) / f"page-{name}.png")

    def text_of(self, which):
        return self.page.locator(".message .body").nth(which).inner_text()

    def test_conversations(self):
        self.write("the king said")
        first = self.text_of(1)
        self.assertTrue(first)
        self.page.click("text=Regenerate")
        self.ends()
        self.assertEqual(self.text_of(1), first)
        self.write("and then")
        self.assertEqual(self.count(".message"), 4)
        # Nothing is lost before the edited message is sent.
        for leave in (lambda: self.page.keyboard.press("Escape"), lambda: self.page.click("text=Leave as it is")):
            self.page.locator("text=Edit").first.click()
            self.assertEqual(self.page.input_value("#text"), "the king said")
            self.assertEqual((self.count(".message"), self.count(".editing")), (4, 1))
            leave()
            self.assertEqual((self.count(".message"), self.count(".editing"), self.page.input_value("#text")), (4, 0, ""))
        self.page.locator("text=Edit").first.click()
        self.write("a queen")
        self.assertEqual((self.count(".message"), self.text_of(0)), (2, "a queen"))
        self.page.click("#new")
        self.write("bread")
        self.assertEqual(self.count("#list li"), 2)
        self.page.reload()
        self.wait("document.querySelectorAll('#list li').length == 2")
        self.assertEqual(self.text_of(0), "bread")
        self.page.locator("#list li button").first.click()
        self.assertEqual(self.text_of(0), "a queen")
        self.page.locator("[aria-label=Delete]").first.click()
        self.assertEqual(self.count("#list li"), 1)
        self.assertEqual(self.said, [])

    def test_stopping(self):
        self.set(max_tokens="150000")
        self.page.fill("#text", "the")
        self.page.press("#text", "Enter")
        self.wait("document.querySelectorAll('.message .body')[1]?.textContent.length > 50")
        self.page.keyboard.press("Escape")
        self.ends()
        self.assertEqual(self.count(".error"), 0)
        commands.wait_for(lambda: self.server.ask("GET", "/slots", headers={"Authorization": "Bearer " + KEY})[2][0]["is_processing"] is False,
                          "the place is free")

    def test_a_server_that_dies(self):
        self.set(max_tokens="150000")
        self.page.fill("#text", "the")
        self.page.press("#text", "Enter")
        self.wait("document.querySelectorAll('.message .body')[1]?.textContent.length > 50")
        self.server.process.kill()
        self.ends()
        self.assertEqual(self.count(".error"), 1)

    def test_inside(self):
        self.page.click("#look")
        self.set(max_tokens="160")
        self.write("the king the king the king the king")
        self.wait("document.getElementById('about-experts').textContent.includes('busiest')")
        figures = self.page.inner_text("#figures")
        for word in ("drafts accepted", "tokens a pass", "with MHA"):
            self.assertIn(word, figures)
        accepted, drafted = map(int, figures.split("drafts accepted")[1].split("(")[0].split("of"))
        spans = self.page.evaluate("conversations[0].messages[1].pieces.map(([, kind]) => kind)")
        # A character of several tokens is one piece, and the last one may come with the end.
        self.assertLessEqual(spans.count("drafted"), accepted)
        self.assertGreaterEqual(spans.count("drafted"), accepted - 2)
        self.assertEqual(spans.count("wrong") > 0, drafted > accepted)
        self.assertEqual(self.count(".message .drafted"), spans.count("drafted"))
        self.shot("light")
        self.page.click("#theme")
        self.assertEqual(self.page.evaluate("getComputedStyle(document.documentElement).colorScheme"), "dark")
        self.shot("dark")
        self.page.set_viewport_size({"width": 390, "height": 800})
        self.shot("phone")
        self.page.click("#settings")
        self.shot("settings")
        # Nothing reaches beyond the window, nor beyond the dialog.
        self.assertEqual(self.page.evaluate("document.documentElement.scrollWidth"), 390)
        self.assertEqual(self.page.evaluate("[...document.querySelectorAll('dialog, dialog input')].filter(one => one.getBoundingClientRect().right"
                                            " > document.querySelector('dialog').getBoundingClientRect().right).length"), 0)
        self.page.click("dialog button")
        self.page.click("#menu")
        self.assertTrue(self.page.is_visible("#list"))
        self.page.keyboard.press("Escape")
        self.assertFalse(self.page.is_visible("#list"))
        self.assertEqual(self.said, [])

    def test_what_a_model_writes_is_text(self):
        show = """text => { const body = document.createElement("div"); body.append(markdown(text)); document.body.append(body); return body.innerHTML }"""
        for text in ("<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 1'>", "[a](javascript:window.hit=1)",
                     "[a](https://a\" onmouseover=\"window.hit=1)", "```\n<script>window.hit = 1</script>\n```", "# <svg onload='window.hit = 1'>",
                     "> <iframe srcdoc='<script>parent.hit = 1</script>'>", "**<b onclick='window.hit = 1'>**", "- `<img src=x onerror='window.hit = 1'>`"):
            html = self.page.evaluate(show, text)
            for tag in ("<script", "<img", "<svg", "<iframe", "<b ", "href=\"javascript"):
                self.assertNotIn(tag, html)
        self.assertEqual(self.page.evaluate(show, "# A\n**b** *c* `d<e`\n\n- f\n\n1. g\n\n> h\n\n[i](https://j.k)"),
                         "<h3>A</h3><p><strong>b</strong> <em>c</em> <code>d&lt;e</code></p><ul><li>f</li></ul><ol><li>g</li></ol>"
                         "<blockquote>h</blockquote><p><a href=\"https://j.k\" rel=\"noreferrer noopener\" target=\"_blank\">i</a></p>")
        self.assertEqual(self.page.evaluate("[...document.body.querySelectorAll('*')].filter(one => one.getAttributeNames()"
                                            ".some(name => name.startsWith('on'))).length"), 0)
        self.assertIsNone(self.page.evaluate("window.hit ?? null"))
        # Long texts of marks alone take no long time.
        for text in ("`", "``x", "*", "**a", "[", "* ", "`a "):
            self.assertLess(self.page.evaluate("text => { const begin = performance.now(); markdown(text); return performance.now() - begin }",
                                               text * 5000), 2000, text)
        # Where there is no clipboard (HTTP, not this machine), copying works in the old way.
        self.page.evaluate("() => { window.copied = null; navigator.clipboard.writeText = () => { throw new Error() };"
                           " document.addEventListener('copy', () => copied = document.activeElement.value) }")
        self.page.evaluate("copyText('a text')")
        self.assertEqual(self.page.evaluate("copied"), "a text")
        self.assertEqual(self.said, [])


if __name__ == "__main__":
    commands.LATENTE, commands.REFERENCE = os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).absolute()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
