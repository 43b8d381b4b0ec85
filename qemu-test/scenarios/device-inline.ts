/**
 * Our driver in the guest, through kernel VFIO and the vIOMMU, on the IPsec function of the software device: capabilities, and the bodies
 * that also run on QEMU's virtio-net and over vfio-user. The wire brings back what the device encrypts, so the device must open it
 * again; whether it is right is for Linux to say, in `xfrm-inline.ts`.
 */
import { algorithmNames, Feature, modeName, type Nic } from '../../src/index.ts';
import { flowBody, flowChecks } from '../bodies/flows.ts';
import { addPair, IpsecCheck, ipsecBody, keyOf } from '../bodies/ipsec.ts';
import { NicCheck, nicBody } from '../bodies/nic.ts';
import { type Guest, same } from '../guest/guest.ts';
import { endWires, guestPlace } from '../guest/place.ts';
import { serveWires } from '../host/wire.ts';
import type { Scenario } from '../scenario.ts';

const MAC = '52:54:00:00:0b:01';
const MTU = 1500;
const MODES = ['AH transport', 'AH tunnel', 'ESP transport', 'ESP tunnel'];
/** Of a pair of SAs of its own. */
const ROUND = 90;
const PAIRS = 2;
/** The format that the other bodies do not take: they are left to choose, and choose packed virtqueues. */
const RING = 'split';
/** The wire answers whatever address is asked. */
const PEER = { mac: Uint8Array.of(2, 0, 0, 0, 0, 1), address: [10, 8, 0, 1], own: [10, 8, 0, 2] } as const;
const { ACCESS_PLATFORM, CSUM, EVENT_IDX, GUEST_CSUM, IPSEC, MRG_RXBUF, RING_RESET } = Feature;
const FLOW_FEATURES = [ACCESS_PLATFORM, CSUM, EVENT_IDX, GUEST_CSUM, IPSEC, MRG_RXBUF, RING_RESET];

const Check = {
  features: 'IPSEC, ADMIN_VQ and all four feature words reach the driver in the guest',
  capability: 'the capabilities name modes and algorithms',
  query: 'the device keeps the SA, and its keys are not shown',
} as const;

export const scenario: Scenario = {
  title: 'our driver inline on the software device, through VFIO and the vIOMMU',
  machine: { qemu: 'vfioUser' },
  devices: [{ kind: 'vfio-user', id: 'nic', link: 'host', args: ['--mac', MAC, '--queue-pairs', String(PAIRS)] }],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 420,
  checks: [
    ...Object.values(Check),
    ...Object.values(NicCheck),
    ...Object.values(IpsecCheck),
    ...flowChecks(RING, PAIRS),
  ],

  async guest(guest) {
    const place = guestPlace(guest, 'nic');
    await nicBody(place, { mac: MAC, mtu: MTU, features: [Feature.ACCESS_PLATFORM, Feature.IPSEC] });
    await ipsecBody(place, 'inline', { ipsec: 'inline' }, (nic) => lookAt(nic, guest));
    await place.wire({ kind: 'echo', how: 'reflect' });
    await flowBody(place, { ring: RING, pairs: PAIRS, peer: PEER, features: FLOW_FEATURES, ipsec: 'inline' });
    endWires(guest);
  },

  host: serveWires,
};

async function lookAt(nic: Nic, guest: Guest): Promise<void> {
  await guest.check(Check.features, () => {
    const needed = [Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.ADMIN_VQ, Feature.IPSEC];
    if (!nic.features.hasAll(...needed)) throw new Error(nic.features.names().join(' '));
    return nic.features.names().join(' ');
  });
  await guest.check(Check.capability, () => {
    const { inline } = nic.ipsec;
    if (inline === null) throw new Error(`${nic.ipsec.inlineObstacle}`);
    same('modes', inline.modes.map(({ mode }) => modeName(mode)).sort(), MODES);
    const names = inline.modes.map((entry) => Object.values(algorithmNames(entry)).flat().join(' '));
    if (names.some((list) => list === '')) throw new Error(`a mode without algorithms: ${names.join('; ')}`);
    return names[0];
  });
  await guest.check(Check.query, async () => {
    const [sa] = await addPair(nic, ROUND);
    const object = await sa.query();
    same('SPI', object?.spi, 0x2000 + ROUND);
    const shown = JSON.stringify(object, (_, value) => (typeof value === 'bigint' ? String(value) : value));
    if (shown.includes(keyOf(nic, ROUND).slice(0, 8))) throw new Error('the key is shown');
  });
}
