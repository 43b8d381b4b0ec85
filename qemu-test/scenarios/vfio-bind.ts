/**
 * A stock guest with its NICs; then a function goes from the kernel to vfio-pci, back, and again; what the driver must refuse on the way.
 */
import { createSocket } from 'node:dgram';
import { bindFunction, unbindFunction } from '../../src/vfio/bind.ts';
import { readIdentity } from '../../src/vfio/config-space.ts';
import { openKernelVfio } from '../../src/vfio/kernel.ts';
import { describeFunction, listFunctions } from '../../src/vfio/sysfs.ts';
import { mustFail, same } from '../guest/guest.ts';
import type { OpenRequest } from '../guest/open-function.ts';
import { Helper } from '../guest/process.ts';
import type { Scenario } from '../scenario.ts';

const NIC_MAC = '52:54:00:00:02:01';
const VIRTIO_NET = { vendorId: 0x1af4, deviceId: 0x1041 } as const;

const MTU = 1400;
const ARP = 0x0806;
/** UDP port (RFC 863). */
const DISCARD = 9;

const Check = {
  interface: 'Linux binds the function and shows the MAC and MTU that QEMU gave it',
  transmit: 'a broadcast of the guest reaches the host with its source address',
  list: 'the list of functions names driver, group and what is missing',
  notBound: 'opening a function that the kernel drives is refused and names the driver',
  route: 'binding the function of the default route is refused',
  bind: 'bind gives the function to vfio-pci and its interface goes away',
  open: 'the bound function opens: configuration space, BARs, vectors, ranges',
  twice: 'a second process cannot open it',
  busy: 'unbind is refused while a process has it',
  unbind: 'unbind gives it back and the interface returns with its address',
  again: 'it can be bound and opened again',
  foreign: 'unbind of a function that is not ours is refused',
} as const;

export const scenario: Scenario = {
  title: 'a stock guest and its NIC; bind, open, unbind, and bind again',
  machine: { qemu: 'stock' },
  devices: [
    { kind: 'virtio-net', id: 'nic', mac: NIC_MAC, mtu: MTU, iommu: true, link: 'host' },
    { kind: 'virtio-net', id: 'uplink', mac: '52:54:00:00:02:02', iommu: false, link: 'host' },
  ],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 240,
  checks: Object.values(Check),

  async guest(guest) {
    const nic = guest.address('nic');
    const interfaceName = guest.interface('nic');

    await guest.check(Check.interface, () => {
      same('MAC', guest.read(`/sys/class/net/${interfaceName}/address`), NIC_MAC);
      same('MTU', guest.read(`/sys/class/net/${interfaceName}/mtu`), String(MTU));
      return guest.must(`ethtool -i ${interfaceName}`).split('\n')[0];
    });
    guest.must(`ip addr add 10.9.1.1/24 dev ${interfaceName} && ip link set ${interfaceName} up`);
    // Nobody has that address: the kernel asks for it.
    const asking = createSocket('udp4');
    asking.send('anybody', DISCARD, '10.9.1.2');
    await guest.hear('seen');
    asking.close();

    await guest.check(Check.list, () => {
      const found = listFunctions().find((fn) => fn.address === nic);
      same('virtio', found?.virtio, 'modern');
      same('driver', found?.driver, 'virtio-pci');
      same('interfaces', found?.interfaces, [interfaceName]);
      same('others', found?.others, []);
      same('missing', found?.missing, ['driver virtio-pci, not vfio-pci']);
      const { stdout } = guest.node('tools/vipsec.js', ['devices', '--json']);
      const shown: { functions: { address: string; ready: boolean }[] } = JSON.parse(stdout);
      same('vipsec devices', shown.functions.find((fn) => fn.address === nic)?.ready, false);
      return `IOMMU group ${found?.group}`;
    });
    await guest.check(Check.notBound, async () => {
      const message = await mustFail('NOT_BOUND', () => openKernelVfio(nic));
      if (!message.includes('virtio-pci')) throw new Error(message);
      return message;
    });
    await guest.check(Check.route, () => {
      const uplink = guest.interface('uplink');
      guest.must(
        `ip link set ${uplink} up && ip addr add 10.9.0.2/24 dev ${uplink} && ip route add default via 10.9.0.1`,
      );
      return mustFail('CARRIES_ROUTE', () => bindFunction(guest.address('uplink')));
    });
    await guest.check(Check.bind, () => {
      same('result', bindFunction(nic), { address: nic, from: 'virtio-pci', to: 'vfio-pci' });
      same('interfaces', describeFunction(nic).interfaces, []);
      same('missing', describeFunction(nic).missing, []);
      if (guest.sh(`ip link show ${interfaceName}`).status === 0) throw new Error(`${interfaceName} is still there`);
    });
    await guest.check(Check.open, () => open(nic));
    const holder = await Helper.start('who holds it', guest.nodeCommand('qemu-test/guest/open-function.js', [nic]));
    same('its answer', await holder.request({ bytes: 4096 } satisfies OpenRequest), { opened: true });
    await guest.check(Check.twice, () => mustFail('BUSY', () => openKernelVfio(nic)));
    await guest.check(Check.busy, () => mustFail('BUSY', () => unbindFunction(nic)));
    await holder.end();

    await guest.check(Check.unbind, () => {
      same('result', unbindFunction(nic), { address: nic, from: 'vfio-pci', to: 'virtio-pci' });
      same('MAC', guest.read(`/sys/class/net/${guest.interface('nic')}/address`), NIC_MAC);
    });
    await guest.check(Check.again, () => {
      bindFunction(nic);
      return open(nic);
    });
    await guest.check(Check.foreign, () => mustFail('NOT_BOUND', () => unbindFunction(guest.address('uplink'))));
  },

  async host(host) {
    await host.check(Check.transmit, async () => {
      const source = Buffer.from(NIC_MAC.replaceAll(':', ''), 'hex');
      const frame = await host.link('nic').next((f) => f.readUInt16BE(12) === ARP, 50_000);
      if (!frame.subarray(6, 12).equals(source)) throw new Error(`from ${frame.toString('hex', 6, 12)}`);
    });
    host.tell('seen');
  },
};

function open(address: string): string {
  const fn = openKernelVfio(address);
  try {
    const { vendorId, deviceId } = readIdentity(fn.config);
    same('ids', { vendorId, deviceId }, VIRTIO_NET);
    const bars = [0, 1, 2, 3, 4, 5].map((index) => fn.bar(index).size);
    if (bars.every((size) => size === 0)) throw new Error('it has no BAR');
    if (fn.interruptVectors < 2) throw new Error(`it has ${fn.interruptVectors} vectors`);
    const ranges = fn.iovaRanges.map(({ start, last }) => `${start.toString(16)}-${last.toString(16)}`);
    if (fn.iovaRanges.some(({ start, last }) => start <= 0xfee00000 && last >= 0xfee00000)) {
      throw new Error(`the interrupt window is offered for memory: ${ranges}`);
    }
    return `BARs ${bars}, ${fn.interruptVectors} vectors, ranges ${ranges}`;
  } finally {
    fn.close();
  }
}
