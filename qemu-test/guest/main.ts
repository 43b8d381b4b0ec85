/**
 * Runs scenarios inside the guest, one after the other, as the host says. The guest's second serial port is the line to the host. Each
 * finds the guest as the one before found it, or it is said what that one left behind.
 */
import { constants, openSync, writeFileSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { ReadStream } from 'node:tty';
import { fileURLToPath } from 'node:url';
import { lineSplitter } from '../host/process.ts';
import { loadScenario } from '../load.ts';
import { type GuestMessage, type HostMessage, lastLine, Mailbox, parseHostMessage } from '../messages.ts';
import { describe, Guest } from './guest.ts';
import { GuestState } from './state.ts';

const LINE = '/dev/ttyS1';
/** What is written here is on the console in the order of the kernel's own lines. */
const KERNEL_LOG = '/dev/kmsg';

const line = openSync(LINE, constants.O_RDWR | constants.O_NOCTTY);
const dist = join(dirname(fileURLToPath(import.meta.url)), '../..');
let mailbox = new Mailbox();

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

async function run({ scenario: name, first }: Extract<HostMessage, { type: 'run' }>): Promise<void> {
  mailbox = new Mailbox();
  let isOver = false;
  let error: string | null = null;
  let left: readonly string[] = [];
  try {
    const scenario = await loadScenario(name);
    const sendOwn = (message: GuestMessage) => {
      if (!isOver) send(message);
    };
    const guest = new Guest(sendOwn, mailbox, scenario.devices, dist, first);
    const state = new GuestState(scenario.devices.map(({ id }) => guest.address(id)));
    state.giveFunctions();
    await scenario.guest(guest).catch((failure: unknown) => {
      error = describe(failure);
    });
    // Of a guest that failed nobody asks what is left.
    if (error === null) left = await state.restore();
  } catch (failure) {
    error = describe(failure);
  }
  isOver = true;
  finish(name, error, left);
}

function finish(name: string, error: string | null, left: readonly string[]): void {
  if (error !== null) process.stdout.write(`FAIL: ${error}\n`);
  writeFileSync(KERNEL_LOG, lastLine(name));
  send({ type: 'end', error, left });
}

let current = '';
function fail(error: unknown): never {
  finish(current, describe(error), []);
  process.exit(0);
}

process.on('uncaughtException', fail);
process.on('unhandledRejection', fail);
const split = lineSplitter((text) => {
  const message = parseHostMessage(text);
  if (message?.type === 'note') mailbox.put(message.topic, message.body);
  if (message?.type === 'over') process.exit(0);
  if (message?.type !== 'run') return;
  current = message.scenario;
  void run(message);
});
new ReadStream(line).setEncoding('utf8').on('data', (text) => split(String(text)));
process.stdout.write('waiting for a scenario\n');
send({ type: 'ready' });
