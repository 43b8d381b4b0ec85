/**
 * The conformance suite inside the guest, on the IPsec function behind the kernel's VFIO and the vIOMMU; and the draft of the structures
 * (`rfc-2025-01`), which the driver recognises by itself.
 */
import { areaOf, CHECKS, openFunction, type Check as Rule, runConformance } from '../../src/conform/index.ts';
import { Feature } from '../../src/index.ts';
import { bindFunction } from '../../src/vfio/bind.ts';
import { IpsecCheck, ipsecBody } from '../bodies/ipsec.ts';
import { type Guest, same } from '../guest/guest.ts';
import { endWires, guestPlace } from '../guest/place.ts';
import { serveWires } from '../host/wire.ts';
import type { Scenario } from '../scenario.ts';

/** What the kernel and the vIOMMU have a part in (structures, interrupts, the administration queue), and IPsec. */
const AREAS: readonly string[] = ['PCI', 'INI', 'ADM', 'IPS'];
/** Each mode with every algorithm: sums that an emulated processor takes long for, and that have nothing to do with how the device is reached. */
const SUMS = /^IPS-0(?:18|19|20|21|22|23|24|25)$/;
const isChosen = ({ id }: Rule) => AREAS.includes(areaOf(id)) && !SUMS.test(id);
/** What the device may take for an answer: guests are slow, and so is a busy machine. */
const PATIENCE_MS = 10_000;
/** The fewest checks that must have been made. */
const FEW = 100;

const Check = {
  conform: `the conformance suite passes through the kernel's VFIO: ${AREAS.join(', ')}`,
  draft: 'the driver recognises the draft',
} as const;

const named = (check: string) => `rfc-2025-01: ${check}`;

export const scenario: Scenario = {
  title: 'the conformance suite in the guest; the draft rfc-2025-01 inline',
  machine: { qemu: 'vfioUser' },
  devices: [
    { kind: 'vfio-user', id: 'nic', link: 'loopback' },
    { kind: 'vfio-user', id: 'draft', link: 'host', args: ['--wire', 'rfc-2025-01'] },
  ],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 300,
  checks: [...Object.values(Check), ...Object.values(IpsecCheck).map(named)],

  async guest(guest) {
    await guest.check(Check.conform, () => conform(guest));
    const place = guestPlace(guest, 'draft', (name, body) => guest.check(named(name), body));
    await ipsecBody(place, 'inline', { ipsec: 'inline', wire: 'auto' }, async (nic) => {
      await guest.check(Check.draft, () => same('IPSEC', nic.features.has(Feature.IPSEC), true));
    });
    endWires(guest);
  },

  host: serveWires,
};

async function conform(guest: Guest): Promise<string> {
  const address = guest.address('nic');
  bindFunction(address);
  const chosen = CHECKS.filter(isChosen);
  const { checks, lost } = await runConformance({
    open: () => openFunction(address),
    checks: chosen,
    timeout: PATIENCE_MS,
  });
  const failed = checks.filter(({ verdict }) => verdict === 'fail');
  if (failed.length > 0 || lost !== null) {
    throw new Error([...failed.map(({ id, detail }) => `${id}: ${detail}`), lost ?? ''].join('; '));
  }
  const passed = checks.filter(({ verdict }) => verdict === 'pass').length;
  if (checks.length !== chosen.length || passed < FEW) throw new Error(`only ${passed} checks were made`);
  return `${passed} of ${checks.length} passed, the others do not apply or cannot be tried`;
}
