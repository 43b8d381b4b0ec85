import { testFaults } from './conform-support.ts';

testFaults(['QUE', 'FLT', 'IPS', 'HDR']);
