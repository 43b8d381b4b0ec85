/** A driver process is killed in mid-traffic: nothing of it is left, and the function is driven again. */
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { openNic } from '../../src/index.ts';
import { bindFunction, unbindFunction } from '../../src/vfio/bind.ts';
import { receiveFrames, sendFrames } from '../bodies/frames.ts';
import { expectFrames, offerFrames } from '../bodies/wire.ts';
import { same } from '../guest/guest.ts';
import type { Scenario } from '../scenario.ts';

const FRAMES = 200;
const MTU = 1500;
const KILLS = 2;
/** Milliseconds of traffic before each kill, and for which the wire goes on sending after the last one. */
const MOMENT_MS = 200;

/** A broadcast that is no test frame: what QEMU still holds of it after the flood is let by. */
const NOISE = new Uint8Array(1000).fill(0xff);

const Check = {
  killed: 'the driver is killed while frames go both ways',
  // An IOMMU fault on the console fails the scenario: the wire goes on sending after each kill.
  silent: 'afterwards the function sends nothing more',
  again: 'a new process opens the function and receives byte for byte',
  transmit: 'what the new process sends arrives byte for byte',
  kernel: 'the kernel takes the function back and its interface works',
} as const;

export const scenario: Scenario = {
  title: 'kill the driver in mid-traffic, then drive the function again',
  machine: { qemu: 'stock' },
  devices: [{ kind: 'virtio-net', id: 'nic', mac: '52:54:00:00:06:01', iommu: true, link: 'host' }],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 300,
  checks: Object.values(Check),

  async guest(guest) {
    const address = guest.address('nic');
    bindFunction(address);
    guest.tell('flood', true);
    await guest.check(Check.killed, async () => {
      for (let i = 0; i < KILLS; i++) {
        const driver = guest.spawnNode('qemu-test/guest/flood.js', [address]);
        if (driver.stdout === null) throw new Error('no pipe');
        const over = once(driver, 'exit');
        await Promise.race([
          once(driver.stdout, 'data'),
          over.then(() => Promise.reject(new Error('it ended by itself'))),
        ]);
        await sleep(MOMENT_MS);
        driver.kill('SIGKILL');
        await over;
      }
      return `${KILLS} times`;
    });
    await sleep(MOMENT_MS);
    guest.tell('flood', false);
    guest.tell('count');
    await guest.hear('counted');

    const nic = await openNic(address);
    guest.tell('send');
    await guest.check(Check.again, () => receiveFrames(nic, FRAMES));
    guest.tell('expect');
    await sendFrames(nic, FRAMES);
    await guest.hear('seen');
    await nic.close();
    await guest.check(Check.kernel, () => {
      same('driver', unbindFunction(address).to, 'virtio-pci');
      guest.must(`ip link set ${guest.interface('nic')} up`);
      same('carrier', guest.read(`/sys/class/net/${guest.interface('nic')}/carrier`), '1');
    });
  },

  async host(host) {
    const port = host.link('nic');
    await host.hear('flood');
    port.onFrame = () => {};
    const flood = setInterval(() => {
      for (let i = 0; i < 32 && !port.behind; i++) port.send(NOISE);
    }, 10);
    await host.hear('flood', 120_000).finally(() => clearInterval(flood));
    await host.hear('count');
    await sleep(300);
    const before = port.count;
    await sleep(500);
    await host.check(Check.silent, () => same('frames', port.count - before, 0));
    host.tell('counted');
    await host.hear('send');
    port.onFrame = undefined;
    offerFrames(port, FRAMES, MTU);
    await host.hear('expect');
    await host.check(Check.transmit, () => expectFrames(port, FRAMES, MTU));
    host.tell('seen');
  },
};
