/** What the runner makes of a guest, which a small program plays here. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { failureReport, resultTable } from '../../qemu-test/host/report.ts';
import { runScenario, type ScenarioResult } from '../../qemu-test/host/runner.ts';
import type { Scenario } from '../../qemu-test/scenario.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-runner-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** Each start of the machine does the next of `starts`: what it prints on the console, and what it says to the host. */
interface Start {
  readonly console?: readonly string[];
  readonly messages?: readonly object[];
  readonly status?: number;
}

const HELLO = { type: 'hello', scenario: 's' };
const END = { type: 'end', error: null };
const passed = (check: string) => ({ type: 'check', check, ok: true, detail: '', ms: 1 });

const scenario: Scenario = {
  title: 'a scenario',
  machine: { qemu: 'stock' },
  devices: [],
  modules: [],
  timeout: 20,
  checks: ['one', 'two'],
  guest: async () => {},
};

async function runOn(starts: readonly Start[]): Promise<{ result: ScenarioResult; count: number }> {
  const program = join(folder, 'machine.mjs');
  const log = join(folder, 'starts');
  writeFileSync(log, '');
  writeFileSync(
    program,
    `import { appendFileSync, readFileSync } from 'node:fs';
     import { connect } from 'node:net';
     const starts = ${JSON.stringify(starts)};
     const { console: lines = [], messages = [], status = 0 } = starts[readFileSync('${log}', 'utf8').length];
     appendFileSync('${log}', '.');
     const path = process.argv.find((arg) => arg.startsWith('socket,id=control')).split('path=')[1];
     for (const line of lines) console.log(line);
     const socket = connect(path, () => socket.end(messages.map((m) => JSON.stringify(m) + '\\n').join('')));
     socket.on('close', () => process.exit(status));
     socket.resume();`,
  );
  const machine = { command: process.execPath, args: [program, '--'] };
  const result = await runScenario('s', scenario, {
    components: {
      kernel: '/k',
      release: '6',
      modules: '/m',
      busybox: '/b',
      tools: '/t',
      qemu: { stock: machine, vfioUser: machine },
    },
    image: { initramfs: '/i', base: '/e' },
    dist: '/d',
    guestDist: 'dist',
    interactive: false,
    signal: new AbortController().signal,
  });
  return { result, count: readFileSync(log, 'utf8').length };
}

const GOOD: Start = { messages: [HELLO, passed('one'), passed('two'), END] };
const PANIC: Start = { console: ['[    2.0] Kernel panic - not syncing: Attempted to kill init!'] };

describe('a guest', () => {
  it('whose checks are all made and pass has passed', async () => {
    const { result, count } = await runOn([GOOD]);
    expect([result.passed, result.restarted, count]).toEqual([true, null, 1]);
  });

  it('that panics before its first word is started once more, and the result says why', async () => {
    const { result, count } = await runOn([PANIC, GOOD]);
    expect([result.passed, count]).toEqual([true, 2]);
    expect(result.restarted).toMatch(/Kernel panic/);
    expect(resultTable([result])).toMatch(/pass, 2 boots/);
  });

  it('that panics twice has failed', async () => {
    const { result, count } = await runOn([PANIC, PANIC]);
    expect([result.passed, count]).toEqual([false, 2]);
    expect(result.problems.join()).toMatch(/Kernel panic/);
  });

  it('that panics once the scenario has begun has failed, and is not started again', async () => {
    const { result, count } = await runOn([{ ...PANIC, messages: [HELLO, passed('one')] }, GOOD]);
    expect([result.passed, result.restarted, count]).toEqual([false, null, 1]);
    expect(result.problems.join()).toMatch(/powered off before the scenario was over.*Kernel panic/);
  });

  it('cannot pass when QEMU does not start', async () => {
    const { result, count } = await runOn([{ status: 1 }, GOOD]);
    expect([result.passed, count]).toEqual([false, 1]);
    expect(result.problems).toEqual(['QEMU ended with 1']);
  });
});

describe('a failing scenario', () => {
  it('shows what was not made, the last lines of the guest, and how to run it alone and interactively', async () => {
    const lines = ['what came last'];
    const { result } = await runOn([{ console: lines, messages: [HELLO, passed('one'), END] }]);
    const report = failureReport(result, 'npm run test:qemu --');
    expect(report).toMatch(/not run +two/);
    expect(report).toMatch(/the guest's last lines:\n {2}\| what came last\n/);
    expect(report).toMatch(/alone: +npm run test:qemu -- --only s --verbose/);
    expect(report).toMatch(/interactively: +npm run test:qemu -- --only s --interactive/);
  });

  it('is one with a check that fails, that nobody expected, or that was made twice', async () => {
    const failed = { ...passed('two'), ok: false, detail: 'why' };
    expect((await runOn([{ messages: [HELLO, passed('one'), failed, END] }])).result.passed).toBe(false);
    for (const more of ['three', 'one']) {
      const { result } = await runOn([{ messages: [HELLO, passed('one'), passed('two'), passed(more), END] }]);
      expect(result.passed).toBe(false);
      expect(result.problems.join()).toMatch(more);
    }
  });
});
