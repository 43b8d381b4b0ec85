/**
 * Runs the conformance suite against software devices in the test's own process: what is tried is the device and the checks, not the socket
 * between them.
 */
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
import { LocalDevice, type LocalSetup } from './local-device.ts';

/** Milliseconds that a device has for an answer where one may fail to come: it has its turn whenever the check waits, so no machine is too slow. */
const TIMEOUT = 150;

/** Runs checks on a fresh device with `setup`; with link `pair`, its second function is the peer. */
export async function conform(
  setup: LocalSetup = {},
  only: readonly string[] | null = null,
  run: Partial<ConformanceOptions> = {},
): Promise<ConformanceReport> {
  const device = new LocalDevice(setup);
  try {
    return await runConformance({
      open: () => device.open(),
      ...(setup.link === 'pair' ? { openPeer: () => device.open(1) } : {}),
      timeout: TIMEOUT,
      ...run,
      checks: only === null ? CHECKS : CHECKS.filter((check) => only.includes(check.id)),
    });
  } finally {
    device.close();
  }
}

/** Results for a message: `ADM-004 fail: …`. */
export function lines(results: readonly CheckResult[]): string[] {
  return results.map(({ id, verdict, detail }) => `${id} ${verdict}: ${detail}`);
}

/** Checks that need more than one function with one queue pair on a loopback. */
const SETUPS: Readonly<Record<string, LocalSetup>> = {
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
export function faultTable(areas: readonly Area[]): { id: string; title: string; fault: string; setup: LocalSetup }[] {
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
