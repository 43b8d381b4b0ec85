import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { startVipsec, vipsecProcess } from './vipsec.ts';

let folder = '';
beforeEach(() => {
  // Everything that the demo makes, it makes here.
  folder = mkdtempSync(join(tmpdir(), 'vipsec-demo-test-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true });
});

/** Processes whose command line names this test's folder. */
function leftover(): string[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name) && name !== String(process.pid))
    .flatMap((pid) => {
      try {
        return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
      } catch {
        return [];
      }
    })
    .filter((line) => line.includes(folder));
}

/** The children of process `pid`. */
function childrenOf(pid: number): number[] {
  try {
    return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ').filter(Boolean).map(Number);
  } catch {
    return [];
  }
}

/** Bytes of the wire that the demo has put into its capture. */
function captured(): number {
  const [place] = readdirSync(folder);
  return statSync(join(folder, place ?? '', 'wire.pcap'), { throwIfNoEntry: false })?.size ?? 0;
}

const env = (): Record<string, string> => ({ TMPDIR: folder });

describe('vipsec demo', () => {
  test('shows inline and software IPsec agreeing on real traffic, and refuses what an attacker does', async () => {
    const out = join(folder, 'kept');
    const { code, stdout, stderr } = await vipsecProcess(['demo', '--json', '--rounds', '2', '--out', out], {
      env: env(),
    });
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    const report = JSON.parse(stdout);
    expect(report.ok).toBe(true);
    expect(report.checks.length).toBeGreaterThan(20);
    expect(report.checks.every((check: { ok: boolean }) => check.ok)).toBe(true);
    const [there, back] = report.directions;
    expect(there).toMatchObject({ protectedBy: 'inline', verifiedBy: 'software', refused: { icv: 1, replay: 1 } });
    expect(back).toMatchObject({ protectedBy: 'software', verifiedBy: 'inline', refused: { icv: 1, replay: 1 } });
    expect(there.arrived.verified).toBeGreaterThan(500);
    expect(back.arrived.verified).toBeGreaterThan(500);
    // Capture and decryption file are where it was told to leave them, no key is in what it prints, and nothing else is left.
    expect(report.files).toEqual([join(out, 'wire.pcap'), join(out, 'esp_sa')]);
    expect(readdirSync(out).sort()).toEqual(['esp_sa', 'wire.pcap']);
    const keys = [...readFileSync(join(out, 'esp_sa'), 'utf8').matchAll(/"0x([0-9a-f]{32,})"/g)].map(
      (match) => match[1],
    );
    expect(keys).toHaveLength(4);
    for (const key of keys) expect(stdout).not.toContain(key.slice(0, 16));
    expect(readdirSync(folder)).toEqual(['kept']);
    rmSync(out, { recursive: true });
    expect(leftover()).toEqual([]);
  });

  test('prints tables for people, says that tshark is missing when it is, and leaves nothing behind', async () => {
    const { code, stdout, stderr } = await vipsecProcess(['demo', '--rounds', '1'], {
      env: { ...env(), PATH: join(folder, 'nothing') },
    });
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(stdout).toMatch(/east to west +inline +software/);
    expect(stdout).toMatch(/west to east +software +inline/);
    expect(stdout).toMatch(/numbers checked, all right/);
    expect(stdout).toMatch(/tshark is not installed/);
    expect(stdout).not.toMatch(/left:/);
    expect(readdirSync(folder)).toEqual([]);
    expect(leftover()).toEqual([]);
  });

  async function runningDemo() {
    const child = startVipsec(['demo', '--rounds', '5000'], env());
    let stderr = '';
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    // In the middle of its traffic: the capture of the wire goes to its file by the quarter of a mebibyte.
    const deadline = performance.now() + 25_000;
    while (captured() === 0 && performance.now() < deadline) await sleep(10);
    expect(captured()).toBeGreaterThan(0);
    return { child, devices: childrenOf(child.pid ?? 0), stderr: () => stderr };
  }

  test.each(['SIGINT', 'SIGTERM'] as const)('cleans up after %s', async (signal) => {
    const { child } = await runningDemo();
    child.kill(signal);
    const [, by] = await once(child, 'close');
    expect(by).toBe(signal);
    expect(readdirSync(folder)).toEqual([]);
    expect(leftover()).toEqual([]);
  });

  test.each([0, 1])('ends with a typed error and cleans up when device %i dies in the middle', async (which) => {
    const { child, devices, stderr } = await runningDemo();
    process.kill(devices[which], 'SIGKILL');
    const [code] = await once(child, 'close');
    expect(code).toBe(1);
    expect(stderr()).toMatch(/^vipsec: error: .+ \[[A-Z_]+\]\n(hint: .*\n)?$/);
    expect(readdirSync(folder)).toEqual([]);
    expect(leftover()).toEqual([]);
  });
});
