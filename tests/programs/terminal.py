#!/usr/bin/env python3
"""What the programs do on a terminal: a progress bar, a prompt for questions, streaming, and interrupts."""

import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tty
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import BIN, PICTURE, TINY, main  # noqa: E402

# Some thousand tokens take long enough to be interrupted, and fit in the context of this checkpoint when it is enlarged.
LONG = ["--max-tokens", "30000", "--temperature", "1", "--seed", "3"]


class Terminal(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        self.addCleanup(os.close, self.master)
        self.seen = ""
        self.process = None
        # A context so long that an answer takes seconds, and no token that ends it.
        self.endless = self.directory / "endless"
        shutil.copytree(TINY, self.endless)
        config = (self.endless / "config.json").read_text()
        (self.endless / "config.json").write_text(re.sub(r'"max_position_embeddings": \d+', '"max_position_embeddings": 40000', config))
        (self.endless / "generation_config.json").write_text('{"eos_token_id": 1000000}')

    def start(self, program, *arguments, **streams):
        self.process = subprocess.Popen([str(BIN / program), *map(str, arguments)], **{"stdin": subprocess.DEVNULL, **streams})
        self.addCleanup(self.stop)
        os.close(self.slave)
        self.slave = -1

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()

    def tearDown(self):
        if self.slave >= 0:
            os.close(self.slave)

    def read_until(self, pattern, seconds=60):
        """What appears on the terminal until `pattern` does; pattern None: until the program closes it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = pattern is not None and re.search(pattern, self.seen)
            if found:
                before, self.seen = self.seen[:found.end()], self.seen[found.end():]
                return before
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.master, 65536)
                except OSError:  # Linux says EIO when the other side is closed
                    piece = b""
                if not piece:
                    if pattern is None:
                        return self.seen
                    break
                self.seen += piece.decode("utf-8", errors="replace")
        self.fail(f"{pattern!r} did not appear, but {self.seen!r}")

    def test_progress_bar(self):
        self.start("m2lm-caption", "--model", TINY, "--max-tokens", "4", PICTURE, stdout=subprocess.PIPE, stderr=self.slave)
        out = self.process.communicate()[0].decode()
        bar = self.read_until(None)
        self.assertIn("loading [", bar)
        self.assertIn("100 %", bar)
        self.assertTrue(bar.endswith("\r\033[K"), "the bar is wiped out")
        self.assertNotIn("loading", out)
        self.assertEqual(self.process.returncode, 0)

    def test_no_progress_bar_when_only_output_is_a_terminal(self):
        self.start("m2lm-caption", "--model", TINY, "--max-tokens", "4", PICTURE, stdout=self.slave, stderr=subprocess.PIPE)
        out, err = self.read_until(None), self.process.communicate()[1]
        self.assertEqual((self.process.returncode, err), (0, b""))
        self.assertNotIn("loading", out)

    def test_conversation(self):
        self.start("m2lm-vqa", "--model", TINY, "--image", PICTURE, "--max-tokens", "4", stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE)
        self.assertEqual(self.read_until("> "), "> ")
        os.write(self.master, b"What is it?\n")
        self.read_until(r"\n> ")
        os.write(self.master, b"And this?\n")
        self.read_until(r"\n> ")
        self.process.send_signal(signal.SIGINT)
        self.assertIn(self.process.wait(60), (-signal.SIGINT, 130))

    def test_interrupt_ends_the_answer_but_not_the_conversation(self):
        self.start("m2lm-vqa", "--model", self.endless, "--image", PICTURE, *LONG, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE)
        self.read_until("> ")
        os.write(self.master, b"What is it?\n")
        self.read_until(r"[^>\s]")  # the answer has begun
        self.process.send_signal(signal.SIGINT)
        self.read_until(r"\n> ")
        self.assertIsNone(self.process.poll())

    def test_interrupt_ends_the_program_otherwise(self):
        for arguments in (["m2lm-caption", PICTURE], ["m2lm-vqa", "--image", PICTURE, "--question", "What?"]):
            with self.subTest(program=arguments[0]):
                self.process = subprocess.Popen([str(BIN / arguments[0]), "--model", str(self.endless), *LONG, *map(str, arguments[1:])],
                                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.addCleanup(self.stop)
                first = self.process.stdout.read(1)  # tokens come before the answer is done
                self.process.send_signal(signal.SIGINT)
                out, err = self.process.communicate(timeout=60)
                self.assertEqual(self.process.returncode, 130, err)
                self.assertTrue((first + out).endswith(b"\n"))
                self.assertEqual(err, b"")


if __name__ == "__main__":
    main()
