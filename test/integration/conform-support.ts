/** Runs the conformance suite against software devices in another process. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  type Area,
  areaOf,
  CHECKS,
  type CheckResult,
  type ConformanceOptions,
  type ConformanceReport,
  runConformance,
  type Trial,
} from '../../src/conform/index.ts';
import type { DeviceOptions } from '../../src/device/index.ts';
import { openFunction } from '../../src/index.ts';
import { deviceHost } from './device-host.ts';

/** Milliseconds that a device of this machine may take for an answer, with other tests beside it. */
const TIMEOUT = 600;

export type Setup = Omit<DeviceOptions, 'sockets'>;

/** Runs checks on a fresh device with `setup`; with link `pair`, its second function is the peer. */
export async function conform(
  setup: Setup = {},
  only: readonly string[] | null = null,
  run: Partial<ConformanceOptions> = {},
): Promise<ConformanceReport> {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-conform-'));
  try {
    const peer = setup.link === 'pair';
    const sockets = (peer ? ['a', 'b'] : ['a']).map((name) => join(folder, name));
    const device = await deviceHost().start({ ...setup, sockets });
    try {
      return await runConformance({
        open: () => openFunction(`vfio-user:${sockets[0]}`),
        ...(peer ? { openPeer: () => openFunction(`vfio-user:${sockets[1]}`) } : {}),
        timeout: TIMEOUT,
        ...run,
        checks: only === null ? CHECKS : CHECKS.filter((check) => only.includes(check.id)),
      });
    } finally {
      await device.stop();
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Results for a message: `ADM-004 fail: …`. */
export function lines(results: readonly CheckResult[]): string[] {
  return results.map(({ id, verdict, detail }) => `${id} ${verdict}: ${detail}`);
}

/** Checks that need more than one function with one queue pair on a loopback. */
const SETUPS: Readonly<Record<string, Setup>> = {
  // Two receive queues, one of which is reset.
  'FLT-016': { queuePairs: 2 },
  // Two receive queues to choose from.
  'CTL-023': { queuePairs: 2, link: 'pair' },
  'CTL-024': { queuePairs: 2, link: 'pair' },
  'CTL-025': { queuePairs: 2, link: 'pair' },
  'CTL-026': { queuePairs: 2, link: 'pair' },
  'CTL-030': { queuePairs: 2 },
  'CTL-031': { queuePairs: 2 },
  'CTL-032': { queuePairs: 2 },
  // A sender that may send longer packets.
  'HDR-038': { link: 'pair' },
};

/** Every check of `areas` with every fault that it must find, as rows of a table test. */
export function faultTable(areas: readonly Area[]): { id: string; title: string; fault: string; setup: Setup }[] {
  const trials = CHECKS.filter((check): check is Trial => 'run' in check && areas.includes(areaOf(check.id)));
  return trials.flatMap(({ id, title, faults }) =>
    faults.map((fault) => ({ id, title, fault, setup: { ...SETUPS[id], faults: fault.split('+') } })),
  );
}

/** The table test: each check fails on a device that has its fault. */
export function testFaults(areas: readonly Area[]): void {
  describe(`each conformance check of ${areas.join(', ')}`, () => {
    it.each(faultTable(areas))('$id fails on a device with the fault $fault: $title', async ({ id, setup }) => {
      const { checks } = await conform(setup, [id]);
      expect(
        checks.map(({ verdict }) => verdict),
        lines(checks).join('\n'),
      ).toEqual(['fail']);
    });
  });
}
