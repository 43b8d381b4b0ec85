import { afterEach, describe, expect, it } from 'vitest';
import { areaOf, CHECKS } from '../../src/conform/index.ts';
import type { WireRevision } from '../../src/device/index.ts';
import { conform } from './conform-support.ts';
import { cleanUp, startDevice } from './support.ts';
import { vipsec } from './vipsec.ts';

afterEach(cleanUp);

interface Check {
  readonly id: string;
  readonly verdict: string;
  readonly detail: string;
}

/** Milliseconds that a device may take for an answer on a machine that has other things to do. */
const PATIENT = 2000;
/** All checks, some of which wait for what does not come. */
const MINUTES = 180_000;

/** On a device in this process; `areas` null: all. */
async function conformHere(wire: WireRevision, areas: readonly string[] | null): Promise<readonly Check[]> {
  const ids = CHECKS.map(({ id }) => id).filter((id) => areas === null || areas.includes(areaOf(id)));
  const { checks, device } = await conform({ personality: 'octep', wire }, ids, { timeout: PATIENT });
  expect(device.ring).toBe('packed');
  return checks;
}

/** Its status register is memory, and says yes to everything. */
const KNOWN = ['INI-006'];

function expectConforms(checks: readonly Check[], areas: readonly string[]): void {
  expect(checks.filter(({ verdict }) => verdict === 'fail').map(({ id }) => id)).toEqual(KNOWN);
  const passed = (area: string) => checks.filter(({ id, verdict }) => id.startsWith(area) && verdict === 'pass').length;
  for (const area of areas) expect(passed(area), area).toBeGreaterThan(3);
  expect(passed('QUE')).toBe(0);
}

/** What differs by the revision, and what must pass so that the rest can. */
const REVISED = ['INI', 'ADM', 'CAP', 'OBJ', 'FLT', 'IPS', 'HDR'];

describe('vipsec conform on an octeon_ep class function', () => {
  it(
    'finds what it does against the standard, and passes it in the rest',
    async () => {
      const checks = await conformHere('virtio-1.4', null);
      expectConforms(checks, ['PCI', 'RST', 'PKD', 'CTL', ...REVISED]);
      const vendor = checks.find(({ id }) => id === 'PCI-002');
      expect(vendor).toMatchObject({ verdict: 'not-applicable', detail: expect.stringMatching(/ids of its vendor/) });
    },
    MINUTES,
  );

  it(
    'does so by the draft',
    async () => {
      expectConforms(await conformHere('rfc-2025-01', REVISED), REVISED);
    },
    MINUTES,
  );

  it('does so with several queue pairs and without IPsec, in another process', async () => {
    const { addresses } = await startDevice({ personality: 'octep', ipsec: false, queuePairs: 4 });
    const only = ['INI', 'CTL', 'PKD'];
    const command = ['conform', addresses[0], '--json', '--timeout', '2000', '--only', only.join()];
    const { code, stdout } = await vipsec(command, { deadline: MINUTES });
    expect(code).toBe(1);
    const report: { checks: readonly Check[]; device: { ring: string } } = JSON.parse(stdout);
    expect(report.device.ring).toBe('packed');
    expectConforms(report.checks, only);
  });
});
