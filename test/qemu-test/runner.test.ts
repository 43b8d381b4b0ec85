/** What the runner makes of a guest, which a small program plays here. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Host } from '../../qemu-test/host/host.ts';
import { failureReport, resultTable } from '../../qemu-test/host/report.ts';
import { runScenarios } from '../../qemu-test/host/runner.ts';
import type { ScenarioResult } from '../../qemu-test/host/scenario-run.ts';
import type { Scenario, ScenarioDevice } from '../../qemu-test/scenario.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-runner-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** What a guest does: prints on its console, speaks to the host. */
interface Deeds {
  readonly console?: readonly string[];
  readonly messages?: readonly object[];
  /** Ends the machine, with this exit code. */
  readonly status?: number;
}

/** Each start of the machine does the next of `starts`: what it does to boot, and what when it is to run a scenario. */
interface Start {
  readonly boot?: Deeds;
  readonly scenarios?: Readonly<Record<string, Deeds>>;
}

const END = { type: 'end', error: null, left: [] };
const passed = (check: string) => ({ type: 'check', check, ok: true, detail: '', ms: 1 });
const ready = { messages: [{ type: 'ready' }] };
const good: Deeds = { messages: [passed('one'), passed('two'), END] };
const panic = (...messages: object[]): Deeds => ({
  messages,
  console: ['[    2.0] Kernel panic - not syncing: Attempted to kill init!'],
  status: 0,
});

const scenario: Scenario = {
  title: 'a scenario',
  machine: { qemu: 'stock' },
  devices: [],
  modules: [],
  timeout: 20,
  checks: ['one', 'two'],
  guest: async () => {},
};

interface Outcome {
  readonly results: readonly ScenarioResult[];
  /** Of each start: the scenarios that it was told to run, with the places of their devices. */
  readonly starts: readonly string[];
}

async function runAll(
  scenarios: Readonly<Record<string, Partial<Scenario>>>,
  starts: readonly Start[],
  jobs = 1,
): Promise<Outcome> {
  const program = join(folder, 'machine.mjs');
  const log = join(folder, 'starts');
  writeFileSync(log, '');
  writeFileSync(
    program,
    `import { appendFileSync, readFileSync } from 'node:fs';
     import { connect } from 'node:net';
     const starts = ${JSON.stringify(starts)};
     const { boot = ${JSON.stringify(ready)}, scenarios = {} } = starts[readFileSync('${log}', 'utf8').split('|').length - 1];
     appendFileSync('${log}', '|');
     const path = process.argv.find((arg) => arg.startsWith('socket,id=control')).split('path=')[1];
     const write = (stream, text) => new Promise((resolve) => stream.write(text, resolve));
     const socket = connect(path);
     async function act({ console: lines = [], messages = [], status }, name) {
       for (const line of lines) await write(process.stdout, line + '\\n');
       if (name !== undefined) await write(process.stdout, '[ 9.9] vipsec: ' + name + ' is over\\n');
       for (const message of messages) await write(socket, JSON.stringify(message) + '\\n');
       if (status !== undefined) socket.end(() => process.exit(status));
     }
     let rest = '';
     socket.on('data', (data) => {
       const lines = (rest + data).split('\\n');
       rest = lines.pop();
       for (const line of lines) {
         const { type, scenario, first } = JSON.parse(line);
         if (type !== 'run') continue;
         appendFileSync('${log}', scenario + first + ' ');
         act(scenarios[scenario], scenario);
       }
     });
     socket.on('connect', () => act(boot));`,
  );
  const machine = { command: process.execPath, args: [program, '--'] };
  const results = await runScenarios(
    Object.entries(scenarios).map(([name, more]) => ({ name, scenario: { ...scenario, ...more } })),
    {
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
      jobs,
    },
  );
  const told = readFileSync(log, 'utf8').split('|').slice(1);
  return { results, starts: told.map((text) => text.trim()) };
}

/** Runs one scenario, whose half in the guest the starts of the machine play. */
async function runOn(
  starts: readonly Start[],
  more: Partial<Scenario> = {},
): Promise<{ result: ScenarioResult; count: number }> {
  const { results, starts: begun } = await runAll({ s: more }, starts);
  return { result: results[0], count: begun.length };
}

const GOOD: Start = { scenarios: { s: good } };
const PANIC: Start = { boot: panic() };

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
    const { result, count } = await runOn([{ scenarios: { s: panic(passed('one')) } }, GOOD]);
    expect([result.passed, result.restarted, count]).toEqual([false, null, 1]);
    expect(result.problems.join()).toMatch(/powered off before the scenario was over.*Kernel panic/);
  });

  it('cannot pass when QEMU does not start', async () => {
    const { result, count } = await runOn([{ boot: { status: 1 } }, GOOD]);
    expect([result.passed, count]).toEqual([false, 1]);
    expect(result.problems).toEqual(['QEMU ended with 1']);
  });
});

const FAULT = '[    7.0] DMAR: [DMA Write] Request device [01:00.0] fault addr 0x1000';
const nic = (id: string): ScenarioDevice => ({
  kind: 'virtio-net',
  id,
  mac: '52:54:00:00:00:01',
  iommu: true,
  link: 'host',
});

describe('a guest with several scenarios', () => {
  it('runs one after the other, each with its own devices', async () => {
    const { results, starts } = await runAll({ a: { devices: [nic('x'), nic('y')] }, b: { devices: [nic('x')] } }, [
      { scenarios: { a: good, b: good } },
    ]);
    expect(results.map(({ name, passed, before }) => [name, passed, before])).toEqual([
      ['a', true, []],
      ['b', true, ['a']],
    ]);
    expect(starts).toEqual(['a0 b2']);
  });

  it('has no other scenario after one that does not pass, for whatever reason: the rest gets a fresh guest', async () => {
    const bad: Record<string, Deeds> = {
      check: { messages: [{ ...passed('one'), ok: false }, passed('two'), END] },
      exception: { messages: [passed('one'), { ...END, error: 'why' }] },
      leftover: { messages: [passed('one'), passed('two'), { ...END, left: ['process 7, sh'] }] },
      fault: { console: [FAULT], ...good },
      process: { messages: [passed('one'), { type: 'exit', status: 139 }] },
      machine: { status: 1 },
    };
    const names = Object.keys(bad);
    const all = ['first', ...names, 'last'];
    const { results, starts } = await runAll(Object.fromEntries(all.map((name) => [name, {}])), [
      ...names.map((_, i) => ({ scenarios: i === 0 ? { first: good, ...bad } : bad })),
      { scenarios: { last: good } },
    ]);
    expect(results.filter((result) => result.passed).map(({ name }) => name)).toEqual(['first', 'last']);
    expect(results.map(({ before }) => before)).toEqual([[], ['first'], ...all.slice(2).map(() => [])]);
    expect(starts).toEqual(['first0 check0', ...all.slice(2).map((name) => `${name}0`)]);
    expect(failureReport(results[1], 'run')).toMatch(/in its guest: +run --only first check --jobs 1\n/);
  });

  it('has no other after one that takes too long, which says in which check', async () => {
    const slow = { messages: [passed('one'), { type: 'begin', check: 'two' }] };
    const { results, starts } = await runAll({ a: { timeout: 1 }, b: { timeout: 1 } }, [
      { scenarios: { a: slow } },
      { scenarios: { b: good } },
    ]);
    expect(results.map((result) => result.passed)).toEqual([false, true]);
    expect(results[0].problems).toEqual(["not over after 1 s in check 'two'"]);
    expect(starts).toEqual(['a0', 'b0']);
  });

  it('gives each scenario its own lines of the console, the boot the first', async () => {
    const { results } = await runAll({ a: {}, b: {} }, [
      {
        boot: { console: ['boot'], ...ready },
        scenarios: { a: { console: ['of a'], ...good }, b: { console: ['of b', FAULT], ...good } },
      },
    ]);
    const lines = results.map(({ console }) => console.filter((line) => !line.includes('is over')));
    expect(lines).toEqual([
      ['boot', 'of a'],
      ['of b', FAULT],
    ]);
    expect(results.map(({ problems }) => problems)).toEqual([[], [`on the console: ${FAULT}`]]);
  });

  it('that cannot start for the device of one of them runs the others', async () => {
    const device: ScenarioDevice = { kind: 'vfio-user', id: 'nic', link: 'loopback' };
    const { results, starts } = await runAll({ a: {}, b: { devices: [device] }, c: {} }, [
      { scenarios: { a: good, c: good } },
    ]);
    expect(results.map((result) => result.passed)).toEqual([true, false, true]);
    expect(results[1].problems.join()).toMatch(/device nic does not start/);
    expect(starts).toEqual(['a0 c0']);
  });

  it('shares the work with a job that has nothing to do', async () => {
    const starts = Array.from({ length: 3 }, (): Start => ({ scenarios: { a: good, b: good, c: good } }));
    const { results, starts: begun } = await runAll({ a: {}, b: {}, c: {} }, starts, 2);
    expect(results.every((result) => result.passed)).toBe(true);
    // Two machines at once write into one log.
    expect(begun.join(' ').trim().split(/\s+/).sort()).toEqual(['a0', 'b0', 'c0']);
  });
});

describe("a scenario's half on the host", () => {
  it('makes checks of its own, and has what it was told to do done before the next scenario begins', async () => {
    const done: string[] = [];
    const host = async (h: Host) => {
      await new Promise((resolve) => setTimeout(resolve, 150));
      await h.check('two', () => done.push('two'));
    };
    const half = { messages: [passed('one'), END] };
    const { results } = await runAll({ a: { host } }, [{ scenarios: { a: half } }]);
    expect([results[0].passed, done]).toEqual([true, ['two']]);
  });

  it('that waits for what never comes ends with the half in the guest', async () => {
    const { result } = await runOn([{ scenarios: { s: panic() } }], {
      host: async (h) => void (await h.hear('never')),
    });
    expect(result.problems.join()).toMatch(/the host's half failed: no note on 'never' will come/);
  });
});

describe('a failing scenario', () => {
  it('shows what was not made, the last lines of the guest, and how to run it alone and interactively', async () => {
    const lines = ['what came last'];
    const { result } = await runOn([{ scenarios: { s: { console: lines, messages: [passed('one'), END] } } }]);
    const report = failureReport(result, 'npm run test:qemu --');
    expect(report).toMatch(/not run +two/);
    expect(report).toMatch(/the guest's last lines:[\s\S]*\n {2}\| what came last\n/);
    expect(report).toMatch(/alone: +npm run test:qemu -- --only s --verbose/);
    expect(report).toMatch(/interactively: +npm run test:qemu -- --only s --interactive/);
  });

  it('is one with a check that fails, that nobody expected, or that was made twice', async () => {
    const failed = { ...passed('two'), ok: false, detail: 'why' };
    expect((await runOn([{ scenarios: { s: { messages: [passed('one'), failed, END] } } }])).result.passed).toBe(false);
    for (const more of ['three', 'one']) {
      const { result } = await runOn([
        { scenarios: { s: { messages: [passed('one'), passed('two'), passed(more), END] } } },
      ]);
      expect(result.passed).toBe(false);
      expect(result.problems.join()).toMatch(more);
    }
  });
});
