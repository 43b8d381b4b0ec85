import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
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

const env = (): Record<string, string> => ({ TMPDIR: folder });

describe('vipsec demo', () => {
  test('shows inline and software IPsec agreeing on real traffic, and refuses what an attacker does', async () => {
    const { code, stdout, stderr } = await vipsecProcess(['demo', '--json', '--rounds', '2'], { env: env() });
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    const report = JSON.parse(stdout);
    expect(report.ok).toBe(true);
    expect(report.checks.length).toBeGreaterThan(20);
    expect(report.checks.every((check: { ok: boolean }) => check.ok)).toBe(true);
    const [out, back] = report.directions;
    expect(out).toMatchObject({ protectedBy: 'inline', verifiedBy: 'software', refused: { icv: 1, replay: 1 } });
    expect(back).toMatchObject({ protectedBy: 'software', verifiedBy: 'inline', refused: { icv: 1, replay: 1 } });
    expect(out.arrived.verified).toBeGreaterThan(500);
    expect(back.arrived.verified).toBeGreaterThan(500);
    expect(report.files).toEqual([]);
    expect(readdirSync(folder)).toEqual([]);
    expect(leftover()).toEqual([]);
  });

  test('prints tables for people; leaves capture and decryption file where it is told, and no key in what it prints', async () => {
    const out = join(folder, 'kept');
    const { code, stdout, stderr } = await vipsecProcess(['demo', '--rounds', '1', '--out', out], { env: env() });
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(stdout).toMatch(/east to west +inline +software/);
    expect(stdout).toMatch(/west to east +software +inline/);
    expect(stdout).toMatch(/numbers checked, all right/);
    expect(readdirSync(out).sort()).toEqual(['esp_sa', 'wire.pcap']);
    const keys = [...readFileSync(join(out, 'esp_sa'), 'utf8').matchAll(/"0x([0-9a-f]{32,})"/g)].map(
      (match) => match[1],
    );
    expect(keys).toHaveLength(4);
    for (const key of keys) expect(stdout).not.toContain(key.slice(0, 16));
    expect(readdirSync(folder)).toEqual(['kept']);
  });

  test('says that tshark is missing when it is, and is right all the same', async () => {
    const { code, stdout } = await vipsecProcess(['demo', '--json', '--rounds', '1'], {
      env: { ...env(), PATH: join(folder, 'nothing') },
    });
    expect(code).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ ok: true, tshark: null });
  });

  async function runningDemo() {
    const child = startVipsec(['demo', '--rounds', '5000'], env());
    const pid = child.pid ?? 0;
    let stderr = '';
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    for (let i = 0; i < 500 && childrenOf(pid).length < 2; i++) await sleep(10);
    await sleep(500);
    return { child, devices: childrenOf(pid), stderr: () => stderr };
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
