/** Runs one scenario inside the guest: `node main.js NAME`. The guest's second serial port is the line to the host. */
import { constants, openSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { ReadStream } from 'node:tty';
import { fileURLToPath } from 'node:url';
import { lineSplitter } from '../host/process.ts';
import { loadScenario } from '../load.ts';
import { type GuestMessage, Mailbox, parseHostMessage } from '../messages.ts';
import { describe, Guest } from './guest.ts';

const LINE = '/dev/ttyS1';

const name = process.argv[2] ?? '';
const line = openSync(LINE, constants.O_RDWR | constants.O_NOCTTY);
const mailbox = new Mailbox();

/** The terminal takes some 4 KiB at once, and says EAGAIN until it has sent them. */
function writeLine(text: string): void {
  const bytes = Buffer.from(`${text}\n`);
  for (let at = 0; at < bytes.length; ) {
    try {
      at += writeSync(line, bytes, at);
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'EAGAIN')) throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
    }
  }
}

function send(message: GuestMessage): void {
  writeLine(JSON.stringify(message));
  if (message.type === 'check') {
    process.stdout.write(`${message.ok ? 'pass' : 'FAIL'}: ${message.check} ${message.detail} (${message.ms} ms)\n`);
  }
}

function finish(error: unknown): never {
  const text = error === null ? null : describe(error);
  if (text !== null) process.stdout.write(`FAIL: ${text}\n`);
  send({ type: 'end', error: text });
  process.exit(0);
}

process.on('uncaughtException', finish);
process.on('unhandledRejection', finish);
const split = lineSplitter((text) => {
  const message = parseHostMessage(text);
  if (message !== undefined) mailbox.put(message.topic, message.body);
});
new ReadStream(line).setEncoding('utf8').on('data', (text) => split(String(text)));

send({ type: 'hello', scenario: name });
try {
  const scenario = await loadScenario(name);
  const dist = join(dirname(fileURLToPath(import.meta.url)), '../..');
  await scenario.guest(new Guest(send, mailbox, scenario.devices, dist));
} catch (error) {
  finish(error);
}
finish(null);
