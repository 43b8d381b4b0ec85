/** The machinery itself: Linux's own virtio_net on a QEMU function, and frames to and from the host. */
import type { Scenario } from '../scenario.ts';

const MAC = '52:54:00:00:01:01';

const Check = {
  interface: 'Linux binds the function and shows the MAC and MTU that QEMU gave it',
  transmit: 'a broadcast of the guest reaches the host with its source address',
  iommu: 'the function has an IOMMU group of its own',
} as const;

export const scenario: Scenario = {
  title: 'a stock guest: kernel, modules, NIC, link to the host',
  machine: { qemu: 'stock' },
  devices: [{ kind: 'virtio-net', id: 'nic', mac: MAC, mtu: 1400, iommu: true, link: 'host' }],
  modules: ['virtio_pci', 'virtio_net'],
  timeout: 60,
  checks: Object.values(Check),

  async guest(guest) {
    const name = guest.interface('nic');
    await guest.check(Check.interface, () => {
      const mac = guest.read(`/sys/class/net/${name}/address`);
      const mtu = guest.read(`/sys/class/net/${name}/mtu`);
      if (mac !== MAC || mtu !== '1400') throw new Error(`${mac}, MTU ${mtu}`);
      return guest.must(`ethtool -i ${name}`).split('\n')[0];
    });
    await guest.check(Check.iommu, () => {
      const group = guest.must(`ls /sys/bus/pci/devices/${guest.address('nic')}/iommu_group/devices`).trim();
      if (group !== guest.address('nic')) throw new Error(`the group holds ${group}`);
    });
    guest.must(`ip addr add 10.9.0.1/24 dev ${name} && ip link set ${name} up`);
    guest.sh(`ping -c 3 -W 1 -i 0.2 10.9.0.2`);
    await guest.hear('seen');
  },

  async host(host) {
    await host.check(Check.transmit, async () => {
      const source = Buffer.from(MAC.replaceAll(':', ''), 'hex');
      const frame = await host.link('nic').next((f) => f.readUInt16BE(12) === 0x0806, 50_000);
      if (!frame.subarray(6, 12).equals(source)) throw new Error(`from ${frame.toString('hex', 6, 12)}`);
    });
    host.tell('seen');
  },
};
