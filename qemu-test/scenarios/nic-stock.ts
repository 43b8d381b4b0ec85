/** Our driver on QEMU's own virtio-net, through the kernel's VFIO: what it sees, and every byte that it moves. */
import { readdirSync } from 'node:fs';
import { Feature, type Nic, openFunction, openNic } from '../../src/index.ts';
import { bindFunction } from '../../src/vfio/bind.ts';
import { receiveFrames, sendFrames } from '../bodies/frames.ts';
import { expectFrames, offerFrames } from '../bodies/wire.ts';
import { type Guest, same } from '../guest/guest.ts';
import type { Host } from '../host/host.ts';
import type { QemuNic, Scenario } from '../scenario.ts';

const MAC = '52:54:00:00:05:01';
const MTU = 1400;
const FRAMES = 400;
const REOPEN = 3;

const Check = {
  open: 'openNic negotiates with the device, and sees its MAC, MTU and link',
  receive: 'frames of all lengths arrive in order and byte for byte',
  transmit: 'frames of all lengths leave in order and byte for byte',
  statistics: 'the statistics count what was moved',
  linkDown: 'the link is seen to go down and up',
  flr: 'after a function-level reset the NIC opens again and moves frames',
  reopen: 'opening and closing again and again leaks no descriptor and no mapping',
  placement: 'an SA on a device without IPsec runs in software and says why',
} as const;
const TRANSMITTED_AGAIN = 'after the reset, too, frames leave byte for byte';

export const scenario = nicScenario('', {}, []);

/** The scenario on a device with more properties, of which `features` are to be negotiated too. */
export function nicScenario(how: string, properties: NonNullable<QemuNic['properties']>, features: number[]): Scenario {
  return {
    title: `our driver on QEMU's virtio-net through kernel VFIO${how}`,
    machine: { qemu: 'stock' },
    devices: [{ kind: 'virtio-net', id: 'nic', mac: MAC, mtu: MTU, iommu: true, link: 'host', properties }],
    modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
    timeout: 120,
    checks: [...Object.values(Check), TRANSMITTED_AGAIN],

    async guest(guest) {
      const address = guest.address('nic');
      bindFunction(address);
      const nic = await openNic(address);
      await guest.check(Check.open, () => {
        same('MAC', Buffer.from(nic.mac).toString('hex'), MAC.replaceAll(':', ''));
        same('MTU', nic.mtu, MTU);
        same('link', nic.link.up, true);
        const needed = [
          ...features,
          Feature.VERSION_1,
          Feature.ACCESS_PLATFORM,
          Feature.MAC,
          Feature.MTU,
          Feature.STATUS,
        ];
        if (!nic.features.hasAll(...needed)) throw new Error(`negotiated ${nic.features}`);
      });
      await exchange(guest, nic, Check.receive);
      await guest.check(Check.statistics, () => {
        const { rx, tx } = nic.statistics();
        if (rx.packets < FRAMES || tx.packets !== FRAMES) throw new Error(JSON.stringify({ rx, tx }));
        same('invalid', [rx.invalid, tx.invalid, rx.dropped, tx.dropped], [0, 0, {}, {}]);
      });
      await guest.check(Check.linkDown, async () => {
        for (const up of [false, true]) {
          guest.tell('link', up);
          await guest.hear('link is set');
          same('link', nic.link.up, up);
        }
      });
      await guest.check(Check.placement, async () => {
        const aead = { name: 'aes-gcm', key: '000102030405060708090a0b0c0d0e0f', salt: '00000001' } as const;
        const tunnel = { source: '192.0.2.1', destination: '192.0.2.2' };
        const sa = await nic.ipsec.addSa({ direction: 'outbound', mode: 'tunnel', spi: 256, aead, tunnel });
        same('where', sa.placement.where, 'software');
        return sa.placement.because;
      });
      await nic.close();
      await guest.check(Check.flr, async () => {
        const fn = openFunction(address);
        fn.reset();
        fn.close();
        const again = await openNic(address);
        await exchange(guest, again, null);
        await again.close();
      });
      await guest.check(Check.reopen, async () => {
        const before = readdirSync('/proc/self/fd').length;
        for (let i = 0; i < REOPEN; i++) await (await openNic(address)).close();
        same('descriptors', readdirSync('/proc/self/fd').length, before);
      });
    },

    async host(host) {
      await serve(host, Check.transmit);
      for (let i = 0; i < 2; i++) {
        await host.qemu('set_link', { name: 'nic', up: await host.hear('link') });
        host.tell('link is set');
      }
      await serve(host, TRANSMITTED_AGAIN);
    },
  };
}

/** The guest's half of an exchange; `check` is the name of the check of what arrives. */
async function exchange(guest: Guest, nic: Nic, check: string | null): Promise<void> {
  guest.tell('send');
  if (check === null) await receiveFrames(nic, FRAMES);
  else await guest.check(check, () => receiveFrames(nic, FRAMES));
  guest.tell('expect');
  await sendFrames(nic, FRAMES);
  await guest.hear('seen');
}

async function serve(host: Host, check: string): Promise<void> {
  const port = host.link('nic');
  await host.hear('send');
  offerFrames(port, FRAMES, MTU);
  await host.hear('expect');
  await host.check(check, () => expectFrames(port, FRAMES, MTU));
  host.tell('seen');
}
