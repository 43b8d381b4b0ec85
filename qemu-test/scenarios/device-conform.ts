/**
 * The conformance suite inside the guest, on the IPsec function behind the kernel's VFIO and the vIOMMU; and the draft of the structures
 * (`rfc-2025-01`), which the driver recognises by itself.
 */
import { Feature, openNic } from '../../src/index.ts';
import { bindFunction } from '../../src/vfio/bind.ts';
import { IpsecCheck, ipsecBody } from '../bodies/ipsec.ts';
import { type Guest, same } from '../guest/guest.ts';
import { endWires, guestPlace } from '../guest/place.ts';
import { serveWires } from '../host/wire.ts';
import type { Scenario } from '../scenario.ts';

/** Areas whose checks open the device a few times at most: opening one takes a second under emulation. */
const AREAS = ['ADM', 'IPS'] as const;
/** What the device may take for an answer: guests are slow, and so is a busy machine. */
const PATIENCE_MS = 10_000;
/** The fewest checks of these areas that must have been made. */
const FEW = 20;

const Check = {
  conform: `vipsec conform passes in the guest: ${AREAS.join(', ')}`,
  draft: 'the driver recognises the draft',
} as const;

const named = (check: string) => `rfc-2025-01: ${check}`;

export const scenario: Scenario = {
  title: 'vipsec conform in the guest; the draft rfc-2025-01 inline',
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
    await guest.check(Check.draft, async () => {
      const nic = await openNic(place.address, { ipsec: 'inline', wire: 'auto' });
      same('IPSEC', nic.features.has(Feature.IPSEC), true);
      await nic.close();
    });
    await ipsecBody(place, 'inline', { ipsec: 'inline', wire: 'auto' });
    endWires(guest);
  },

  host: serveWires,
};

function conform(guest: Guest): string {
  const address = guest.address('nic');
  bindFunction(address);
  const { status, stdout, stderr } = guest.node('tools/vipsec.js', [
    'conform',
    address,
    '--json',
    '--timeout',
    String(PATIENCE_MS),
    '--only',
    AREAS.join(','),
  ]);
  if (stdout === '') throw new Error(stderr);
  const { summary, checks } = JSON.parse(stdout);
  const failed = checks.filter((check: { verdict: string }) => check.verdict === 'fail');
  if (status !== 0 || failed.length > 0)
    throw new Error(failed.map((c: { id: string; detail: string }) => `${c.id}: ${c.detail}`).join('; '));
  if (summary.pass < FEW) throw new Error(`only ${summary.pass} checks were made`);
  return JSON.stringify(summary);
}
