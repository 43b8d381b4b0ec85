import type { ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startDeviceProcess, stop, vipsec } from './vipsec.ts';

let folder = '';
let device: ChildProcess | undefined;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-octep-conform-'));
});
afterEach(async () => {
  if (device !== undefined) await stop(device);
  device = undefined;
  rmSync(folder, { recursive: true });
});

interface Check {
  readonly id: string;
  readonly verdict: string;
  readonly detail: string;
}

/** All checks, some of which wait for what does not come. */
const MINUTES = 180_000;

async function conform(deviceArgs: string[], args: string[] = []): Promise<readonly Check[]> {
  const socket = join(folder, 'device');
  device = await startDeviceProcess(socket, ['--personality', 'octep', ...deviceArgs]);
  const command = ['conform', `vfio-user:${socket}`, '--json', '--timeout', '2000', ...args];
  const { code, stdout } = await vipsec(command, { deadline: MINUTES });
  expect(code).toBe(1);
  const report: { checks: readonly Check[]; device: { ring: string } } = JSON.parse(stdout);
  expect(report.device.ring).toBe('packed');
  return report.checks;
}

/** Its status register is memory, and says yes to everything. */
const KNOWN = ['INI-006'];

describe('vipsec conform on an octeon_ep class function', () => {
  it.each(['virtio-1.4', 'rfc-2025-01'])(
    'finds what it does against the standard, and passes it in the rest, %s',
    async (wire) => {
      const checks = await conform(['--wire', wire]);
      expect(checks.filter(({ verdict }) => verdict === 'fail').map(({ id }) => id)).toEqual(KNOWN);
      const passed = (area: string) =>
        checks.filter(({ id, verdict }) => id.startsWith(area) && verdict === 'pass').length;
      for (const area of ['PCI', 'INI', 'RST', 'PKD', 'CTL', 'ADM', 'CAP', 'OBJ', 'FLT', 'IPS', 'HDR']) {
        expect(passed(area), area).toBeGreaterThan(3);
      }
      expect(passed('QUE')).toBe(0);
      const vendor = checks.find(({ id }) => id === 'PCI-002');
      expect(vendor).toMatchObject({ verdict: 'not-applicable', detail: expect.stringMatching(/ids of its vendor/) });
    },
    MINUTES,
  );

  it('does so with several queue pairs and without IPsec', async () => {
    const checks = await conform(['--no-ipsec', '--queue-pairs', '4'], ['--only', 'INI,CTL,PKD']);
    expect(checks.filter(({ verdict }) => verdict === 'fail').map(({ id }) => id)).toEqual(KNOWN);
  });
});
