"""A person at Open WebUI, in a browser: PAGE_URL CHROMIUM QUESTION answer|stop|error. What the page shows is one line of JSON.

answer: wait until the answer is complete; stop: press Stop when it has begun; error: wait for what the page says instead.
"""

import json
import sys

from playwright.sync_api import sync_playwright

url, chromium, question, how = sys.argv[1:]
ANSWER, STOP = "#messages-container .chat-assistant", "button[aria-label='Stop']"
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page()
    page.set_default_timeout(120_000)
    model = "endless" if how == "stop" else "m"
    page.goto(f"{url}/?models={model}")
    box = page.locator("#chat-input")
    box.wait_for()
    for _ in range(2):  # what is new in this release, and other greetings
        page.keyboard.press("Escape")
    box.click()
    page.keyboard.insert_text(question)
    page.keyboard.press("Enter")
    answer = page.locator(ANSWER).last
    answer.wait_for()
    if how == "stop":
        page.wait_for_function("what => document.querySelector(what)?.innerText.includes('aaa')", arg=ANSWER)
        page.locator(STOP).first.click()
    page.locator(STOP).first.wait_for(state="detached")
    print(json.dumps({"text": answer.inner_text(), "page": page.inner_text("body")}), flush=True)
    sys.stdin.read()  # the page stays open
    browser.close()
