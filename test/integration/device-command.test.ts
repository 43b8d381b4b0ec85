import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startDeviceProcess, startVipsec, stop, vipsec } from './vipsec.ts';

let folder = '';
let path = '';
const children: ChildProcess[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-command-'));
  path = join(folder, 'device.sock');
});

afterEach(async () => {
  for (const child of children.splice(0)) await stop(child);
  rmSync(folder, { recursive: true, force: true });
});

/** Starts the command and returns its first line. */
async function start(...args: string[]): Promise<{ child: ChildProcess; line: string }> {
  const child = startVipsec(['device', ...args]);
  children.push(child);
  if (child.stdout === null) throw new Error('no stdout');
  const [line] = await once(createInterface({ input: child.stdout }), 'line');
  return { child, line: String(line) };
}

async function end(child: ChildProcess, signal: NodeJS.Signals): Promise<number | null> {
  const ended = once(child, 'exit');
  child.kill(signal);
  const [code] = await ended;
  return code;
}

describe('vipsec device', () => {
  it('says when it is ready, prints its counters at SIGUSR1 and goes on, and ends well at SIGTERM without its socket', async () => {
    const { child, line } = await start('--socket', path, '--mac', '02:00:00:00:00:07');
    expect(line).toBe(`ready: ${path} mac 02:00:00:00:00:07 ipsec virtio-1.4 queue-pairs 1 link loopback`);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    if (child.stderr === null) throw new Error('no stderr');
    const lines = createInterface({ input: child.stderr });
    const report = once(lines, 'line');
    child.kill('SIGUSR1');
    const [counters] = await report;
    expect(JSON.parse(String(counters))[0]).toMatchObject({ socket: path, txPackets: 0, link: { up: true } });
    expect(child.exitCode).toBeNull();
    expect(await end(child, 'SIGTERM')).toBe(0);
    expect(existsSync(path)).toBe(false);
  });

  it('prints one JSON document for two functions, one of them plain, and ends well at SIGINT', async () => {
    const second = join(folder, 'second.sock');
    const { child, line } = await start(
      '--socket',
      path,
      '--socket',
      second,
      '--ipsec-off',
      '2',
      '--mtu',
      '1600',
      '--json',
    );
    expect(JSON.parse(line)).toMatchObject({
      ready: true,
      pid: child.pid,
      link: 'pair',
      wire: 'virtio-1.4',
      queuePairs: 1,
      mtu: 1600,
      functions: [
        { socket: path, ipsec: true },
        { socket: second, ipsec: false },
      ],
    });
    expect(await end(child, 'SIGINT')).toBe(0);
    expect([existsSync(path), existsSync(second)]).toEqual([false, false]);
  });

  it('is a plain function with --no-ipsec, and ends well at SIGHUP', async () => {
    const { child, line } = await start('--socket', path, '--no-ipsec', '--json');
    expect(JSON.parse(line).functions[0].ipsec).toBe(false);
    expect(await end(child, 'SIGHUP')).toBe(0);
    expect(existsSync(path)).toBe(false);
  });

  it('leaves a socket alone that is in use, and a file, and replaces the socket of a process that was killed', async () => {
    const first = await startDeviceProcess(path);
    children.push(first);
    const outcome = await vipsec(['device', '--socket', path]);
    expect(outcome.code).toBe(1);
    expect(outcome.stderr).toMatch(/SOCKET_IN_USE/);
    const file = join(folder, 'file');
    writeFileSync(file, 'x');
    expect((await vipsec(['device', '--socket', file])).code).toBe(1);
    expect(existsSync(file)).toBe(true);
    await end(first, 'SIGKILL');
    expect(existsSync(path)).toBe(true);
    const { line } = await start('--socket', path);
    expect(line).toMatch(/^ready/);
  });

  it.each([
    ['its socket', (long: string) => ['--socket', long]],
    ['the socket of its link', (long: string) => ['--socket', path, '--link', `unix:${long}`]],
    ['the socket to which its link connects', (long: string) => ['--socket', path, '--link', `unix-connect:${long}`]],
  ])('says how long a path may be: %s', async (_, args) => {
    const { code, stderr } = await vipsec(['device', ...args(join(folder, 'x'.repeat(120)))]);
    expect(stderr).toMatch(/^vipsec: error: .*107 are the most.*\[ENAMETOOLONG\]\nhint: .*shorter/);
    expect(code).toBe(1);
    expect(existsSync(path)).toBe(false);
  });

  it.each([
    ['no socket', []],
    ['a third socket', ['--socket', '/tmp/1', '--socket', '/tmp/2', '--socket', '/tmp/3']],
    ['an unknown link', ['--socket', '/tmp/1', '--link', 'string']],
    ['an unknown personality', ['--socket', '/tmp/1', '--personality', 'odd']],
    ['an unknown wire', ['--socket', '/tmp/1', '--wire', 'virtio-2']],
    ['an unknown fault', ['--socket', '/tmp/1', '--fault', 'hunger']],
    ['a number that is none', ['--socket', '/tmp/1', '--queue-pairs', 'two']],
    ['too many queue pairs', ['--socket', '/tmp/1', '--queue-pairs', '99']],
    ['a MAC address that is none', ['--socket', '/tmp/1', '--mac', 'ff']],
    ['a function that does not exist', ['--socket', '/tmp/1', '--ipsec-off', '2']],
  ])('ends with 2 for %s', async (_, args) => {
    const { code, stderr, stdout } = await vipsec(['device', ...args]);
    expect(code).toBe(2);
    expect(stderr).toMatch(/^vipsec: error: /);
    expect(stdout).toBe('');
  });
});
