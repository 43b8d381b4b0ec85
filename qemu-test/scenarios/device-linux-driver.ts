/**
 * Linux's own virtio_net drives the software device (IPsec not negotiated): a driver that we did not write judges rings,
 * interrupts, configuration and control queue.
 */
import { same } from '../guest/guest.ts';
import { addNamespace, ping, Traffic } from '../guest/namespaces.ts';
import type { Scenario } from '../scenario.ts';

const MAC = '52:54:00:00:0a:01';
const FUNCTION = '10.7.0.1';
const PEER = '10.7.0.2';
const TCP_BYTES = 512 * 1024;
/** Position of a feature in sysfs's string of bits; what Linux negotiates has no room for IPSEC (bit 70) before 6.18. */
const Bit = { mac: 5, status: 16, version1: 32, accessPlatform: 33, ringPacked: 34, ipsec: 70 } as const;

const Check = {
  bind: 'virtio_net binds the function and takes the MAC of the device',
  features: 'VERSION_1 and ACCESS_PLATFORM are negotiated and IPSEC is not',
  link: 'the link is up and MSI-X interrupts are in use',
  ethtool: 'ethtool reads driver, rings, channels, offloads and statistics',
  ping: 'ping crosses, small and of full size, both ways',
  udp: 'UDP datagrams of all sizes come back unchanged',
  tcp: 'a TCP bulk transfer crosses, both ways',
  rebind: 'the driver lets go, binds again, and ping still crosses',
} as const;

export const scenario = linuxScenario(', with packed virtqueues', 'packed');

/** The scenario on a device that takes virtqueues of one format only. */
export function linuxScenario(how: string, rings: 'split' | 'packed'): Scenario {
  return {
    title: `Linux's virtio_net drives the software device${how}`,
    machine: { qemu: 'vfioUser' },
    devices: [
      { kind: 'vfio-user', id: 'function', link: 'wire', args: ['--mac', MAC, '--rings', rings] },
      { kind: 'virtio-net', id: 'peer', mac: '52:54:00:00:0a:02', iommu: false, link: { device: 'function' } },
    ],
    modules: ['virtio_pci', 'virtio_net'],
    timeout: 120,
    checks: Object.values(Check),

    async guest(guest) {
      const address = guest.address('function');
      let name = guest.interface('function');
      await guest.check(Check.bind, () => {
        same('MAC', guest.read(`/sys/class/net/${name}/address`), MAC);
        return guest.must(`ethtool -i ${name}`).split('\n')[0];
      });
      await guest.check(Check.features, () => {
        const virtio = guest.must(`ls /sys/bus/pci/devices/${address}`).match(/virtio\d+/)?.[0];
        const bits = guest.read(`/sys/bus/pci/devices/${address}/${virtio}/features`);
        const negotiated = [...bits].flatMap((bit, i) => (bit === '1' ? [i] : []));
        for (const bit of [Bit.mac, Bit.status, Bit.version1, Bit.accessPlatform]) {
          if (!negotiated.includes(bit)) throw new Error(`bit ${bit} is not among ${negotiated}`);
        }
        same('RING_PACKED', negotiated.includes(Bit.ringPacked), rings === 'packed');
        if (negotiated.includes(Bit.ipsec)) throw new Error('IPSEC is negotiated');
        return negotiated.join(' ');
      });

      addNamespace(guest, 'peer');
      const peer = guest.interface('peer');
      guest.must(
        `ip link set ${peer} netns peer && ip -n peer addr add ${PEER}/24 dev ${peer} && ip -n peer link set ${peer} up`,
      );
      guest.must(`ip addr add ${FUNCTION}/24 dev ${name} && ip link set ${name} up`);
      await guest.check(Check.link, () => {
        same('carrier', guest.read(`/sys/class/net/${name}/carrier`), '1');
        const vectors = guest.must(`ls /sys/bus/pci/devices/${address}/msi_irqs`).trim().split(/\s+/);
        if (vectors.length < 2) throw new Error(`${vectors.length} vectors`);
        return `${vectors.length} vectors`;
      });
      await guest.check(Check.ethtool, () => {
        for (const question of ['-g', '-l', '-k', '-S', '-P']) {
          // Some have no answer without an optional feature; none may fail in another way.
          const { status, stderr } = guest.sh(`ethtool ${question} ${name}`);
          if (status !== 0 && !/not supported|no stats/i.test(stderr)) throw new Error(`${question}: ${stderr}`);
        }
        return guest.must(`ethtool -l ${name}`).match(/Combined:\s+(\d+)/)?.[0];
      });
      await guest.check(Check.ping, () => {
        const sizes = [0, 56, 1472].map((size) => ping(guest, null, PEER, 3, size));
        return [...sizes, ping(guest, 'peer', FUNCTION)].join(', ');
      });
      const here = await Traffic.start(guest, null);
      const there = await Traffic.start(guest, 'peer');
      await guest.check(Check.udp, () =>
        here.request({ kind: 'udp', to: PEER, sizes: [0, 1, 17, 64, 511, 1000, 1472] }),
      );
      await guest.check(Check.tcp, async () => {
        const out = await here.request({ kind: 'tcp', to: PEER, bytes: TCP_BYTES });
        const back = await there.request({ kind: 'tcp', to: FUNCTION, bytes: TCP_BYTES });
        return `${out}; ${back}`;
      });
      here.stop();
      await guest.check(Check.rebind, () => {
        const driver = '/sys/bus/pci/drivers/virtio-pci';
        guest.must(`echo ${address} > ${driver}/unbind && echo ${address} > ${driver}/bind`);
        name = guest.interface('function');
        guest.must(`ip addr add ${FUNCTION}/24 dev ${name} && ip link set ${name} up`);
        return ping(guest, null, PEER);
      });
      there.stop();
    },
  };
}
